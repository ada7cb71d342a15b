"""AdaNAG: the paper's numbers and certificate, and what rounding does to it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from scipy.special import expit

import nag_jax
from nag_jax.methods import adanag as adaptive


def quadratic(curvatures):
    n = len(curvatures)
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))
    hessian = (basis * curvatures) @ basis.T
    solution = np.random.default_rng(2).standard_normal(n)
    value = lambda x: (x - solution) @ hessian @ (x - solution) / 2
    return value, lambda x: hessian @ (x - solution), solution


def trajectory(optimizer, value, start, steps):
    """Params before and states after each call."""

    def body(carry, _):
        params, state = carry
        f, g = jax.value_and_grad(value)(params)
        updates, state = optimizer.update(g, state, params, value=f)
        return (optax.apply_updates(params, updates), state), (params, state)

    start = jnp.asarray(start)
    run = lambda carry: jax.lax.scan(body, carry, length=steps)[1]
    return jax.jit(run)((start, optimizer.init(start)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["quadratic", "logistic"])
def test_equals_the_reference(name):
    """Far from the optimum: near it differences of values are rounding, which the paths follow."""
    if name == "quadratic":
        value, gradient, _ = quadratic(np.logspace(-1, 1, 30))
        numpy_value, start, steps = value, np.zeros(30), 40
    else:
        margins = np.random.default_rng(0).standard_normal((40, 8))
        value = lambda x: jnp.mean(jnp.logaddexp(0.0, margins @ x)) + jnp.sum(x**2) / 200
        numpy_value = lambda x: np.mean(np.logaddexp(0.0, margins @ x)) + np.sum(x**2) / 200
        gradient = lambda x: margins.T @ expit(margins @ x) / 40 + x / 100
        start, steps = 3 * np.ones(8), 25
    # A long trial: of a short one half of the digits would be left in L_0.
    xs, states = trajectory(nag_jax.adanag(initial=0.3), value, start, steps + 2)
    expected, rates, _ = zip(
        *reference.adanag(numpy_value, gradient, start, steps, probe=0.3), strict=True
    )
    np.testing.assert_allclose(states.learning_rate[2:], rates, rtol=1e-10)
    # The second call takes the trial back, and the third is the first step from the start.
    assert np.linalg.norm(xs[1] - start) > 0
    np.testing.assert_allclose(xs[2:], expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(states.inner.carry, np.arange(steps + 2) + 1)
    assert np.any(np.diff(rates) > 0)
    assert np.any(np.diff(rates) < 0) == (name == "logistic")


HARD = {
    "tridiagonal": (2 * np.eye(81) - np.eye(81, k=1) - np.eye(81, k=-1)) / 4,
    "quadratic": np.diag(np.logspace(-6, 0, 100)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [*HARD, "huber"])
def test_certificate(name):
    """f(x_k) - f* <= R^2/(2 A_k s_k); without the momentum, not."""
    if name == "huber":
        value = lambda x: jnp.sum(jnp.where(jnp.abs(x) < 0.01, x**2 / 2, 0.01 * jnp.abs(x) - 5e-5))
        start, steps = np.ones(1), 300
    else:
        value = lambda x: x @ HARD[name] @ x / 2
        start, steps = np.ones(len(HARD[name])), 12_000
    xs, states = trajectory(nag_jax.adanag(), value, start, steps)
    k, rates = np.arange(1, steps - 2), np.asarray(states.learning_rate)[3:]
    mass = (k + 3) * (k + 4) ** 2 / (288 * (k + 15))
    bound = start @ start / (2 * mass * rates)
    gaps = jax.vmap(value)(xs[3:])
    assert 1e-3 < np.max(gaps / bound) <= 1
    if name == "quadratic":

        def descend(x, rate):
            x = x - rate * (HARD[name] @ x)
            return x, value(x)

        _, gaps = jax.lax.scan(descend, jnp.asarray(start), jnp.asarray(rates))
        assert np.max(gaps / bound) > 1.5


def test_rounding_gives_no_invalid_curvatures(monkeypatch):
    """float32 and f* = 1: none with the guard; about a quarter of those that see any without."""
    curvatures = jnp.logspace(-1, 1, 30)
    value = lambda x: jnp.sum(curvatures * (x - 1) ** 2) / 2 + 1

    def invalid():
        xs, states = trajectory(nag_jax.adanag(), value, jnp.zeros(30), 402)
        estimates = np.asarray(states.curvature)[2:]
        assert estimates.dtype == np.float32
        bad = np.sum(~((estimates >= 0) & (estimates < 20)))  # L is 10
        return bad, np.sum(estimates > 0), float(value(xs[-1]))

    bad, seen, last = invalid()
    assert (bad, last) == (0, 1.0)
    assert seen > 100
    monkeypatch.setattr(adaptive, "_ROUNDING", -jnp.inf)
    bad, seen, _ = invalid()
    assert bad > 0.15 * (bad + seen)


def test_never_grows_beyond_what_is_finite():
    for value in (lambda p: jnp.sum(p), lambda p: 0 * jnp.sum(p)):
        _, states = trajectory(nag_jax.adanag(), value, jnp.ones(3), 1000)
        assert np.all(np.isfinite(states.learning_rate))


def test_a_parameter_without_a_gradient_stays():
    optimizer = nag_jax.adanag()
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(4):
        g = {"a": 2 * params["a"], "b": None}
        updates, state = optimizer.update(g, state, params, value=jnp.sum(params["a"] ** 2))
        assert updates["b"] is None
        params = params | {"a": params["a"] + updates["a"]}
    np.testing.assert_array_equal(state.gradient["b"], 0)
    assert jnp.all(params["a"] < 1)


def test_minimize_runs_it():
    value, _, solution = quadratic(np.logspace(-1, 1, 10))
    value = lambda x, f=value: f(x).astype(x.dtype)
    result = nag_jax.minimize(value, jnp.zeros(10), nag_jax.adanag(), tol=1e-3)
    assert result.converged
    assert result.steps < 150
    np.testing.assert_allclose(result.params, solution, atol=1e-2)


def test_errors():
    with pytest.raises(ValueError, match=re.escape("initial must be in (0, inf), got 0")):
        nag_jax.adanag(initial=0.0)
    optimizer = nag_jax.adanag()
    state = optimizer.init(jnp.ones(3))
    with pytest.raises(ValueError, match="adanag needs the value of the loss: call"):
        optimizer.update(jnp.ones(3), state, jnp.ones(3))
