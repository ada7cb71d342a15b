"""The scalar steps of nag_auto, adanag and backtracking, with values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.methods import adanag, backtracking, nag_auto

close = np.testing.assert_allclose


def test_size_counts_a_leaf_from_its_first_gradient_on():
    square = jnp.array([9.0, 16.0, 25.0])
    close(nag_auto._size(square, jnp.array([1.0, 2.0, 3.0])), [3.0, 4.0, 5.0])
    close(nag_auto._size(square, jnp.array([0.0, 2.0, 2.0])), [0.0, 4.0, 4.0])


@pytest.mark.parametrize(
    ("progress", "way", "size", "expected"),
    [
        (0.8, 4.0, 1.0, 2 * 0.8 / (0.1 * 4.0)),  # 2a/b, with a = 0.8/0.1
        (-1.0, 4.0, 100.0, 0.8),  # no progress: a fifth of the way
        (0.0, 4.0, 2.0, 0.2),  # a fifth of half of the size
        (0.0, 0.0, 2.0, 0.0),
    ],
)
def test_reach(progress, way, size, expected):
    close(nag_auto._reach(*map(jnp.float32, (progress, way, size, 0.9))), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("last", "reach", "energy", "last_squares", "expected"),
    [
        (0.0, 7.0, 2.0, 0.0, 0.01 * (1 + 3.0)),  # d_0
        (1.0, 0.5, 1.0, 3.0, 1.0),  # never shorter
        (1.0, 1.5, 1.0, 3.0, 1.5),
        (1.0, 7.0, 1.0, 3.0, 2.0),  # at most 1 + 4 * 1/4 times
    ],
)
def test_distance(last, reach, energy, last_squares, expected):
    squares = last_squares + energy
    arguments = (last, reach, 3.0, energy, last_squares, squares)
    close(nag_auto._distance(*map(jnp.float32, arguments)), expected, rtol=1e-6)


def test_effective_steps_are_geometric_means():
    steps = nag_auto._effective_steps(jnp.array([2.0, 0.0, 8.0]), jnp.array([4.0, 0.0, 16.0]))
    close(steps, [10 * (1.0 * 2.0) ** 0.5, 0.0], rtol=1e-6)


def test_an_energy_that_overflows_counts_as_zero():
    energy, overflow = nag_auto._finite(jnp.array([1.0, jnp.inf, jnp.inf]))
    assert overflow
    close(energy, 0)
    energy, overflow = nag_auto._finite(jnp.array([1.0, jnp.nan, jnp.nan]))
    assert not overflow
    close(energy, [1.0, jnp.nan, jnp.nan])


@pytest.mark.usefixtures("x64")
def test_adanag_learning_rates():
    k = lambda k: jnp.asarray(k, jnp.int32)
    rate = lambda k_, s, c: float(adanag._learning_rate(k(k_), jnp.float64(s), jnp.float64(c)))
    a = lambda k: (k + 3) ** 2 / (24 * (k + 14))
    mass = lambda k: a(k + 1) * (k + 3) / 12
    # s_0 = A_0 r / (a_0 tau_0 a_1 L), with r = 27 / 12030 and a_0 here without tau_0
    assert rate(0, 5.0, 2.0) == pytest.approx(adanag._FIRST / 2)
    # s_3 from s_2, with a curvature too small to matter: A_1 + a_2 over A_2.
    assert rate(3, 0.1, 1e-9) == pytest.approx(0.1 * (mass(1) + a(2)) / mass(2))
    assert rate(1, 0.1, 1e-9) == pytest.approx(0.1 * a(0) / mass(0))
    bound = 1 / (mass(2) / a(2) ** 2 + 2 * a(3) ** 2 / mass(2)) / 50
    assert rate(3, 0.1, 50.0) == pytest.approx(bound)


def test_adanag_calls():
    """Trial, back, and the first step from an empty buffer."""
    rule = adanag._rule()
    call, rows = rule.init(), []
    for _ in range(4):
        call, c = rule.step(call)
        rows.append([float(x) for x in (c.beta, c.kappa, c.direct)])
    tau, a = lambda k: (k + 14) / 12, lambda k: (k + 3) ** 2 / (24 * (k + 14))
    kappa = lambda k: (a(k) - 1) / tau(k + 1)
    expected = [[0, 1, 0], [-1, 0, 0], [0, kappa(0), 1], [(tau(1) - 1) / tau(2), kappa(1), 1]]
    close(rows, expected, rtol=1e-6)


@pytest.mark.parametrize(("after", "ok", "told"), [(0.5, True, True), (0.76, False, True)])
def test_backtracking_accepts_by_the_quadratic_model(after, ok, told):
    # f(y) = 1, <g, u> = -0.5, |u|^2/(2 lr) = 0.25: the bound is 0.75.
    numbers = map(jnp.float32, (after, 1.0, -0.5, 0.25, 1e-6))
    assert backtracking._short_enough(*numbers) == (ok, told)


def test_backtracking_accepts_what_rounding_hides_unless_it_is_not_finite():
    numbers = lambda after: map(jnp.float32, (after, 1.0, -0.5, 0.25, 0.1))
    assert backtracking._short_enough(*numbers(2.0)) == (True, False)
    assert backtracking._short_enough(*numbers(np.nan)) == (False, False)


def test_backtracking_extrapolation():
    number = jnp.float32
    close(backtracking._extrapolation(jnp.array(True), number(3.0), number(4.0)), [0.5, 1.0])
    # Without a step m' = t/t' m = 0.75 m, and the update is m' - m = (1 - 4/3) m'.
    scale, ahead = backtracking._extrapolation(jnp.array(False), number(3.0), number(4.0))
    close([scale, scale * ahead], [0.75, -0.25], rtol=1e-6)


def test_backtracking_t_solves_its_equation():
    t = backtracking._corrected(jnp.float32(6.0), jnp.float32(0.5))
    close(t * (t - 1) * 0.5, 6.0, rtol=1e-6)
    close(t, 4.0, rtol=1e-6)
