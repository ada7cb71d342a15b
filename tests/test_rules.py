"""The rules by themselves, and the one place where a schedule's step depends on who asks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import rules


def test_constant_coefficients_are_python_floats():
    _, nesterov = rules.nesterov(0.9).step(jnp.zeros([], jnp.int32))
    _, trace = rules.trace(0.9, 0.1).step(jnp.zeros([], jnp.int32))
    assert all(isinstance(c, float) for c in (*nesterov, *trace))


def test_schedules_get_an_integer_step_they_can_index_with():
    table = jnp.array([0.0, 0.5, 0.6, 0.7])
    momentum = lambda step: table[step]
    seen = lambda rule, k: float(rule.step(jnp.asarray(k, jnp.int32))[1].beta)
    assert [seen(rules.trace(momentum), k) for k in range(3)] == pytest.approx([0.0, 0.5, 0.6])
    assert [seen(rules.nesterov(momentum), k) for k in range(3)] == pytest.approx([0.5, 0.6, 0.7])


@pytest.mark.usefixtures("x64")
def test_integer_schedules_are_exact_in_float64():
    rule = rules.nesterov(lambda step: step / (step + 3))
    assert rule.step(jnp.asarray(6, jnp.int32))[1].beta == 0.7


@pytest.mark.parametrize("rule", [rules.nesterov, rules.trace])
@pytest.mark.parametrize("momentum", [1.0, -0.5, float("inf"), np.float32(1.5), "0.9"])
def test_bad_momentum_is_refused(rule, momentum):
    with pytest.raises(ValueError, match=r"momentum must be .*\[0, 1\).*schedules\.convex"):
        rule(momentum)


def test_injected_momentum_schedule_is_one_step_early_for_nesterov():
    momentum = lambda step: 0.9 * step / (step + 3.0)
    shifted = lambda step: momentum(step + 1)

    def last(optimizer):
        params = jnp.array([1.0, -2.0])
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(20):
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    inject = lambda momentum: optax.inject_hyperparams(nag_jax.nag)(
        0.1, momentum, convention="sutskever"
    )
    expected = last(nag_jax.nag(0.1, momentum, convention="sutskever"))
    np.testing.assert_allclose(last(inject(shifted)), expected, rtol=1e-5)
    assert np.max(np.abs(last(inject(momentum)) - expected)) > 1e-3


def test_a_rule_is_all_a_new_method_needs():
    """Heavy ball, from its definition, is optax.sgd without Nesterov."""
    heavy_ball = rules.Rule(
        init=lambda: jnp.zeros([]),
        step=lambda k: (k, rules.Coefficients(beta=0.9, kappa=1.0, direct=0.0, readout=0.0)),
    )
    ours = optax.chain(optax.sgd(0.1), nag_jax.accelerate(heavy_ball))
    theirs = optax.sgd(0.1, momentum=0.9)
    results = []
    for optimizer in (ours, theirs):
        params = jnp.array([1.0, -2.0])
        state = optimizer.init(params)
        for _ in range(30):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        results.append(
            (params, nag_jax.eval_params(params, state) if optimizer is ours else params)
        )
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-7)
