"""minimize on scikit-learn's problems: as low as its solution, without a step size."""

import jax.numpy as jnp
import pytest

pytest.importorskip("sklearn")

import nag_jax
from examples import convex

NAMES = (
    "lasso, diabetes",
    "elastic net, diabetes",
    "non-negative, diabetes",
    "one-class SVM, breast cancer",
    "logistic, breast cancer",
    "logistic, digits",
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_reaches_the_solution_of_scikit_learn(name):
    """A relative gap of 1e-9 in float64 and of 1e-6 in float32, both measured in float64."""
    exact = next(p for p in convex.problems() if p.name == name)
    low = float(exact.objective(jnp.asarray(exact.solve())))
    for dtype, gap in (("float64", 1e-9), ("float32", 1e-6)):
        problem = next(p for p in convex.problems(jnp.dtype(dtype)) if p.name == name)
        result = nag_jax.minimize(problem.loss, problem.start, prox=problem.prox, tol=problem.tol)
        assert result.converged
        assert result.params.dtype == dtype
        ours = float(exact.objective(result.params.astype(jnp.float64)))
        assert abs(ours - low) <= gap * low


@pytest.mark.usefixtures("x64")
def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    convex.plot(tmp_path / "gaps.png", steps=3)
    assert (tmp_path / "gaps.png").stat().st_size > 10_000
