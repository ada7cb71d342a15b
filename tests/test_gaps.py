"""Duality gaps: upper bounds of the error in value, and 0 at the solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import nag_jax
from nag_jax import gaps, proximal

rng = np.random.default_rng(0)
A, B = rng.normal(size=(30, 20)), rng.normal(size=30)
LABELS = np.sign(B)
POSITIVE = np.abs(A)
WEIGHTS = rng.uniform(1.0, 4.0, size=20)
least_squares = lambda a, b: lambda x: jnp.sum((a @ x - b) ** 2) / 2
PROBLEMS = {  # the smooth part, the penalty's prox and value, the gap
    "lasso": (
        least_squares(A, B), proximal.l1(3.0), lambda x: 3.0 * jnp.sum(jnp.abs(x)),
        gaps.lasso(A, B, 3.0),
    ),
    "lasso with weights": (
        least_squares(A, B), proximal.l1(WEIGHTS), lambda x: jnp.sum(WEIGHTS * jnp.abs(x)),
        gaps.lasso(A, B, WEIGHTS),
    ),
    "elastic net": (
        least_squares(A, B), proximal.elastic_net(3.0, 2.0),
        lambda x: 3.0 * jnp.sum(jnp.abs(x)) + jnp.sum(x**2), gaps.elastic_net(A, B, 3.0, 2.0),
    ),
    "logistic": (
        lambda x: jnp.sum(jnp.logaddexp(0.0, -LABELS * (A @ x))), proximal.l1(1.0),
        lambda x: jnp.sum(jnp.abs(x)), gaps.logistic_l1(A, LABELS, 1.0),
    ),
    "non-negative": (
        least_squares(POSITIVE, B + 1), proximal.nonnegative(), lambda x: 0.0,
        gaps.nonnegative_least_squares(POSITIVE, B + 1),
    ),
    "non-negative, any matrix": (
        least_squares(A, B), proximal.nonnegative(), lambda x: 0.0,
        gaps.nonnegative_least_squares(A, B, interior=np.linalg.pinv(A.T) @ np.ones(20)),
    ),
}  # fmt: skip
every_problem = pytest.mark.parametrize("name", PROBLEMS)


@pytest.mark.usefixtures("x64")
@every_problem
def test_a_run_stops_at_the_gap(name):
    fun, prox, _, gap = PROBLEMS[name]
    start = jnp.zeros(20)
    loose, tight = (
        nag_jax.minimize(fun, start, prox=prox, error=gap, tol=tol) for tol in (1e-2, 1e-9)
    )
    for result, tol in ((loose, 1e-2), (tight, 1e-9)):
        assert result.converged
        assert result.error <= tol
        np.testing.assert_allclose(gap(result.params), result.error, atol=1e-12)
    assert loose.steps < tight.steps


@pytest.mark.usefixtures("x64")
@every_problem
def test_the_gap_bounds_the_error_in_value(name):
    fun, prox, penalty, gap = PROBLEMS[name]
    best = nag_jax.minimize(fun, jnp.zeros(20), prox=prox, error=gap, tol=1e-11).params
    value = lambda x: fun(x) + penalty(x)
    for scale in (0.0, 0.01, 0.1, 1.0, 10.0):
        noise = scale * rng.normal(size=20)
        x = jnp.maximum(best + noise, 0) if "non-negative" in name else best + noise
        assert gap(x) >= value(x) - value(best) - 1e-10
        assert gap(x) < 100 * (value(x) - value(best)) + 30 * scale + 1e-9  # not a useless bound


def test_the_gap_of_zero_at_the_largest_penalty_is_zero():
    assert abs(gaps.lasso(A, B, np.max(np.abs(A.T @ B)))(jnp.zeros(20))) < 1e-5
    largest = np.max(np.abs(A.T @ LABELS)) / 2
    assert abs(gaps.logistic_l1(A, LABELS, largest)(jnp.zeros(20))) < 1e-4


def test_sparse_matrices():
    small = np.where(np.abs(A) > 1, A, 0)
    x = jnp.asarray(rng.normal(size=20), jnp.float32)
    dense, thin = (gaps.lasso(a, B, 1.0)(x) for a in (small, sparse.BCOO.fromdense(small)))
    np.testing.assert_allclose(dense, thin, rtol=1e-5)


def test_where_no_dual_point_is_known_the_gap_is_infinite():
    assert gaps.nonnegative_least_squares(-POSITIVE, -B - 1)(jnp.zeros(20)) == jnp.inf


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"strength must be in \(0, inf\), got 0"):
        gaps.logistic_l1(A, LABELS, 0.0)
    with pytest.raises(ValueError, match=r"l1 must be in \(0, inf\), got -1"):
        gaps.lasso(A, B, -1.0)
    with pytest.raises(ValueError, match=r"an entry for each of its rows, got shapes \(30, 20\)"):
        gaps.lasso(A, B[:4], 1.0)
    with pytest.raises(ValueError, match=r"one entry for each column, got \(3,\)"):
        gaps.lasso(A, B, 1.0)(jnp.zeros(3))


def test_gaps_can_be_jitted_and_mapped():
    found = jax.jit(jax.vmap(gaps.lasso(A, B, 3.0)))(jnp.zeros((4, 20)))
    np.testing.assert_allclose(found, gaps.lasso(A, B, 3.0)(jnp.zeros(20)), rtol=1e-5)
