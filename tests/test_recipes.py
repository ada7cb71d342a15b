"""The named recipes are the chains they say, and refuse what they cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import proximal, restart, rules

CURVATURES = np.logspace(-3, 0, 10)
START = np.linspace(1.0, 2.0, 10)


def trajectory(tx, steps=300):
    def body(carry, _):
        params, state = carry
        loss, g = jax.value_and_grad(lambda p: jnp.sum(CURVATURES * p**2) / 2)(params)
        updates, state = tx.update(g, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        fired = optax.tree.get(state, "restarts", default=jnp.zeros([], jnp.int32))
        return (params, state), (nag_jax.eval_params(params, state), fired)

    start = jnp.asarray(START)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[1])
    return [np.asarray(out) for out in run((start, tx.init(start)))]


def chain(rule, condition=None, head=None):
    head = optax.sgd(1.0) if head is None else head
    return optax.chain(head, nag_jax.accelerate(rule, restart=condition))


RECIPES = {
    "fista": (nag_jax.fista(1.0), chain(rules.fista(), restart.gradient), True),
    "fista never": (nag_jax.fista(1.0, restart=None), chain(rules.fista()), False),
    "fista value": (
        nag_jax.fista(1.0, restart="value"),
        chain(rules.fista(), restart.value),
        True,
    ),
    "fista speed": (
        nag_jax.fista(1.0, restart="speed"),
        chain(rules.fista(), restart.speed),
        True,
    ),
    "fista every": (
        nag_jax.fista(1.0, restart=restart.every(50)),
        chain(rules.fista(), restart.every(50)),
        True,
    ),
    "fista prox": (
        nag_jax.fista(1.0, proximal.l1(1e-3)),
        chain(rules.fista(), restart.gradient, proximal.prox_step(proximal.l1(1e-3), 1.0)),
        True,
    ),
    "ogm": (nag_jax.ogm(1.0), chain(rules.ogm(), restart.gradient), True),
    "tmm": (nag_jax.tmm(1.0, 1e-3), chain(rules.tmm(1e-3)), False),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_chains(name):
    recipe, expected, fires = RECIPES[name]
    xs, fired = trajectory(recipe)
    np.testing.assert_array_equal(xs, trajectory(expected)[0])
    assert (fired[-1] > 0) == fires


def test_errors():
    for make in (nag_jax.fista, nag_jax.ogm, lambda lr: nag_jax.tmm(lr, 0.1)):
        with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -1"):
            make(-1.0)
    with pytest.raises(ValueError, match=r"restart must be one of 'gradient', .* got 'often'"):
        nag_jax.fista(0.1, restart="often")
    with pytest.raises(ValueError, match=r"wrap it in proximal\.projection"):
        nag_jax.fista(0.1, optax.projections.projection_simplex)
    with pytest.raises(ValueError, match=r"q = mu/L must be in \(0, 1\], got 2"):
        nag_jax.tmm(0.1, q=2.0)
