"""Derivatives through unrolled steps, as in meta-learning: against differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import nag_jax
from nag_jax import proximal, rules
from nag_jax.precision import storage as _storage

pytestmark = pytest.mark.usefixtures("x64")
X = np.random.default_rng(0).normal(size=(16, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.3


def start():
    """Biases start at 0, one leaf has the gradient 0, one None, and one is None itself."""
    return {
        "w": 0.3 * np.random.default_rng(1).normal(size=(3, 4)),
        "b": np.zeros((1, 4)),
        "v": 0.3 * np.ones(4),
        "c": np.zeros(()),
        "zero": np.zeros(2),
        "fixed": np.ones(2),
        "none": None,
    }


def loss(p):
    hidden = jnp.tanh(X @ p["w"] + p["b"])
    return jnp.mean((hidden @ p["v"] + p["c"] * p["fixed"][0] - Y) ** 2)


def final(params, optimizer, steps=3):
    """A number that depends on all that the optimizer made of ``params``."""

    def step(carry, _):
        p, state = carry
        value, gradient = jax.value_and_grad(loss)(p)
        gradient["fixed"] = None
        updates, state = optimizer.update(gradient, state, p, value=value, value_fn=loss)
        moved = {name: p[name] if u is None else p[name] + u for name, u in updates.items()}
        return (moved, state), None

    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    x = nag_jax.eval_params(*carry)
    return loss(carry[0]) + jnp.sin(loss(x)) + sum(jnp.sum(v**2) for v in jax.tree.leaves(x))


def assert_derivative(function, *arguments):
    """That the gradient is what differences say, along a few directions."""
    z, restore = ravel_pytree(jax.tree.map(lambda x: np.asarray(x, float), arguments))
    evaluate = jax.jit(jax.value_and_grad(lambda z: function(*restore(z))))
    gradient = evaluate(z)[1]
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
    for direction in np.random.default_rng(2).normal(size=(3, z.size)):
        ahead, behind = (evaluate(z + h * direction)[0] for h in (1e-6, -1e-6))
        np.testing.assert_allclose(gradient @ direction, (ahead - behind) / 2e-6, rtol=1e-5)


group_l1 = lambda weight: proximal.group_l1(weight, axis=None)
MADE_FROM = {
    "fista": (lambda lr, weight: nag_jax.fista(lr, group_l1(weight)), 0.1, 0.1),
    "fista by value": (lambda lr: nag_jax.fista(lr, restart="value"), 0.3),
    "optista": (lambda lr, weight: nag_jax.optista(lr, group_l1(weight), horizon=3), 0.1, 0.1),
    "monotone_fista": (lambda lr: optax.chain(optax.sgd(lr), nag_jax.monotone_fista(loss)), 3.0),
    "nag_auto": (nag_jax.nag_auto, 1.0, 0.8),
    "nag_auto iterate": (lambda lr, mu: nag_jax.nag_auto(lr, mu, evaluate="iterate"), 1.0, 0.8),
    "backtracking": (lambda: nag_jax.backtracking(),),
    "backtracking prox": (
        lambda lr, shrink: nag_jax.backtracking(group_l1(0.1), initial=lr, shrink=shrink), 9.0, 0.55
    ),
    "adanag": (lambda: nag_jax.adanag(),),
    "adanag from a rate": (lambda lr: nag_jax.adanag(initial=lr), 0.01),
}  # fmt: skip


@pytest.mark.parametrize(("make", "hyper"), [(m, h) for m, *h in MADE_FROM.values()], ids=MADE_FROM)
def test_derivatives_in_start_and_hyperparameters(make, hyper):
    assert_derivative(lambda params, hyper: final(params, make(*hyper)), start(), hyper)


RULES = {
    rules.nesterov: (0.8,), rules.trace: (0.8, 0.1), rules.fista: (), rules.ogm: (),
    rules.chambolle_dossal: (3.5,), rules.strongly_convex: (0.1,),
    rules.estimate_sequence: (0.1, 0.1),
    rules.tmm: (0.1,), rules.item: (0.1,), rules.sc_ogm: (0.1,), rules.lessard: (1.0, 0.5, 0.4),
    rules.robust_momentum: (0.1, 0.4), rules.heavy_ball: (0.8,), rules.qhm: (0.8, 0.6),
    rules.gpa: (0.8, 0.6), rules.agnes: (0.8, 0.5), rules.ema_nesterov: (0.9, 0.5),
    rules.mass: (0.1, 5.0),
    rules.accsgd: (10.0, 2.0, 0.7), rules.srsgd: (), lambda: rules.ogm_g(2): (),
}  # fmt: skip
SIMPLE = {
    nag_jax.nag: (0.1, 0.8),
    lambda lr, mu: nag_jax.nag(lr, mu, convention="sutskever", weight_decay=lr * mu): (0.1, 0.8),
    lambda lr, mu: nag_jax.nag_then_sgd(lr, mu, switch_step=2): (0.05, 0.5),
    lambda lr, power: nag_jax.averaged(nag_jax.nag(lr), power): (0.1, 8.0),
    lambda lr, mu: nag_jax.snoo(nag_jax.nag(lr), 0.5, mu, every=2): (0.1, 0.3),
    lambda lr, slow: nag_jax.lookahead(nag_jax.nag(lr), slow, every=2): (0.1, 0.5),
    lambda lr: nag_jax.ogm(lr, restart="speed"): (0.1,),
    nag_jax.tmm: (0.1, 0.1),
}
SIMPLE |= {
    lambda *hyper, rule=rule: optax.chain(optax.sgd(0.1), nag_jax.accelerate(rule(*hyper))): hyper
    for rule, hyper in RULES.items()
}


def test_derivatives_in_the_hyperparameters_of_every_rule():
    """From a start of 0, where one leaf has the gradient 0."""

    def run(start, hypers):
        total = 0.0
        for make, hyper in zip(SIMPLE, hypers, strict=True):
            optimizer, params = make(*hyper), start
            state = optimizer.init(params)
            for _ in range(3):
                gradient = {"a": jnp.sinh(params["a"] - 1), "b": jnp.zeros(2)}
                updates, state = optimizer.update(gradient, state, params)
                params = optax.apply_updates(params, updates)
            x = nag_jax.eval_params(params, state)
            total += sum(jnp.sum(v**2) for v in jax.tree.leaves((params, x)))
        return total

    assert_derivative(run, {"a": 0.0, "b": np.zeros(2)}, tuple(SIMPLE.values()))


CURVATURE, TARGET = np.array([1.0, 0.3, 0.1]), np.array([1.0, -1.0, 0.5])
INT8 = lambda **kwargs: nag_jax.int8_blocks(min_size=1, **kwargs)


def quadratic(p):
    return jnp.sum(CURVATURE * (p.astype(float) - TARGET) ** 2) / 2


def trained(z, storage, loop=jax.lax.scan, steps=4):
    """The loss after steps with z = (learning rate, momentum, one number of the start)."""
    optimizer = nag_jax.nag(z[0], z[1], accumulator_dtype=storage)
    params = z[2] * jnp.ones(3)

    def step(carry, _):
        updates, state = optimizer.update(jax.grad(quadratic)(carry[0]), carry[1])
        return (carry[0] + updates, state), None

    (params, _), _ = loop(step, (params, optimizer.init(params)), length=steps)
    return quadratic(params)


def python_loop(step, carry, length):
    for _ in range(length):
        carry, _ = step(carry, None)
    return carry, None


def with_the_same_errors(z, storage):
    """A storage in float64 that adds the rounding errors that ``storage`` makes in a run from z."""
    errors = []

    def record(x, m, memory):
        new, memory = storage.store(x, m, memory)
        errors.append(_storage.read(new, memory) - x)
        return new, memory

    trained(z, storage._replace(store=record), python_loop)
    repeat = lambda x, m, k: (x + jnp.stack(errors)[k], k + 1)
    return _storage.Storage(lambda p: (jnp.zeros_like(p), jnp.int32(0)), repeat)


Z = np.array([0.3, 0.9, 0.2])
ROUNDED = {
    "bfloat16": (nag_jax.stochastic_bfloat16(), jax.lax.scan, 2e-2),  # as are its derivatives
    "bfloat16 unrolled": (nag_jax.stochastic_bfloat16(), python_loop, 2e-2),
    "int8": (INT8(differentiable=True), jax.lax.scan, 1e-6),
    "int8 unrolled": (INT8(), python_loop, 1e-6),
}


@pytest.mark.parametrize(("storage", "loop", "tolerance"), ROUNDED.values(), ids=ROUNDED)
def test_rounding_has_the_derivative_of_its_mean(storage, loop, tolerance):
    """A rounded run is one in float64 with other constants, so it has the same derivatives."""
    exact, rounded = with_the_same_errors(Z, storage), lambda z: trained(z, storage, loop)

    def derivatives(f):
        both = lambda z: (f(z), jax.grad(f)(z), jax.jacfwd(f)(z))
        every = lambda z: (*both(z), jax.hessian(f)(z)) if loop is jax.lax.scan else both(z)
        return [x[0] for x in jax.jit(jax.vmap(every))(np.stack([Z, Z / 2]))]

    expected = derivatives(lambda z: trained(z, exact))
    for a, b in zip(derivatives(rounded), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
    if loop is jax.lax.scan:
        outside = jax.grad(jax.jit(rounded))(Z)
        np.testing.assert_allclose(outside, expected[1], atol=tolerance * np.abs(outside).max())


def test_an_int8_buffer_without_room_for_a_derivative_says_so():
    storage = INT8()
    run = lambda z: trained(z, storage)
    for transformed in (jax.grad(run), jax.jacfwd(run), jax.grad(jax.jit(run))):
        with pytest.raises(ValueError, match=r"int8_blocks\(differentiable=True\)"):
            transformed(Z)
    assert np.all(jax.vmap(run)(jnp.stack([Z, Z])) == run(Z))  # without a derivative it works


def test_rounded_parameters_have_the_derivative_of_the_whole_update():
    """Of 20 steps, whose exact result is (1 - lr)^20 of the distance at first."""

    def distance(lr, tail):
        optimizer = optax.chain(optax.sgd(lr), tail)

        def step(carry, _):
            gradient = carry[0].astype(jnp.float32) - 1
            updates, state = optimizer.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        params = jnp.zeros(4096, jnp.bfloat16)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=20)
        return jnp.mean(1 - params.astype(jnp.float32))

    tail, lr = nag_jax.stochastic_rounding(), jnp.float32(0.05)
    value, derivative = jax.value_and_grad(distance)(lr, tail)
    assert value == pytest.approx(0.95**20, rel=1e-2)
    assert derivative == pytest.approx(-20 * 0.95**19, rel=3e-2)
    assert jax.jacfwd(distance)(lr, tail) == pytest.approx(-20 * 0.95**19, rel=3e-2)


def test_second_derivatives_through_backtracking():
    """In what the loss closes over, and in the numbers of the search."""

    def run(z):
        fun = lambda p: jnp.sum(z[:3] * (p - 1) ** 2) / 2 + jnp.sum(jnp.cosh(p))
        optimizer = nag_jax.backtracking(initial=z[3], shrink=z[4])
        params = jnp.zeros(3)
        state = optimizer.init(params)
        for _ in range(2):
            value, gradient = jax.value_and_grad(fun)(params)
            updates, state = optimizer.update(gradient, state, params, value=value, value_fn=fun)
            params = params + updates
        return fun(params)

    z = np.array([3.0, 1.0, 0.2, 5.0, 0.55])
    assert_derivative(run, z)
    if jax.__version_info__ < (0, 8):
        pytest.skip("JAX 0.7 fails in a while_loop that closes over what is differentiated twice")
    slope = np.array([1.0, -1.0, 0.5, 0.3, 0.2])
    assert_derivative(lambda z: slope @ jax.grad(run)(z), z)
