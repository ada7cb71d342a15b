"""The proxes against a general solver of convex problems, which the extra ``certificates`` has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax import proximal

cp = pytest.importorskip("cvxpy")
pytestmark = pytest.mark.slow
VECTOR = np.cumsum(np.random.default_rng(0).normal(size=40)) / 2
MATRIX = np.random.default_rng(1).normal(size=(6, 4))
WEIGHTS = np.linspace(1.5, 0.0, 40)


def slope(z):
    """The sorted l1 norm, as a sum over the k largest magnitudes."""
    steps = WEIGHTS - np.append(WEIGHTS[1:], 0)
    return sum(steps[k] * cp.sum_largest(cp.abs(z), k + 1) for k in range(len(WEIGHTS)))


CASES = {
    "l1": (proximal.l1(0.7), lambda z: 0.7 * cp.norm1(z), VECTOR),
    "non-negative l1": (
        proximal.l1(0.7, nonnegative=True),
        lambda z: 0.7 * cp.norm1(z) + cp.transforms.indicator([z >= 0]),
        VECTOR,
    ),
    "weighted non-negative elastic net": (
        proximal.elastic_net(WEIGHTS, 0.5, nonnegative=True),
        lambda z: WEIGHTS @ cp.abs(z) + 0.25 * cp.sum_squares(z)
        + cp.transforms.indicator([z >= 0]),
        VECTOR,
    ),
    "group_l1": (proximal.group_l1(0.9), lambda z: 0.9 * cp.mixed_norm(z, 2, 1), MATRIX),
    "sorted_l1": (proximal.sorted_l1(WEIGHTS), slope, VECTOR),
    "total_variation": (proximal.total_variation(1.2), lambda z: 1.2 * cp.tv(z), VECTOR),
    "nuclear": (proximal.nuclear(0.8), lambda z: 0.8 * cp.normNuc(z), MATRIX),
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("step", [0.5, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_a_general_solver_finds_the_same(name, step):
    prox, penalty, v = CASES[name]
    z = cp.Variable(v.shape)
    problem = cp.Problem(cp.Minimize(step * penalty(z) + cp.sum_squares(z - v) / 2))
    problem.solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(jax.jit(prox)(jnp.asarray(v), step), z.value, atol=3e-4)
