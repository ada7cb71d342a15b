"""Derivatives of what minimize returns, and the edges of minimize itself.

Expected values are closed forms, or differences of solutions in float64.
"""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

import nag_jax
from nag_jax import Reason, minimize, proximal

RANDOM = np.random.default_rng(1)
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)


def reason(result):
    return Reason(int(result.reason)).name


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_softmax_regression_has_a_singular_hessian():
    """Equal shifts of all classes change nothing. With the last class fixed, all is unique."""
    features = RANDOM.standard_normal((20, 2))
    labels = RANDOM.integers(0, 3, 20)

    def loss(w, scale):
        logits = scale * features @ w
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(cross_entropy) + 0.05 * jnp.sum((w - jnp.mean(w, 1, keepdims=True)) ** 2)

    solve = jax.jit(lambda s: minimize(lambda w: loss(w, s), jnp.zeros((2, 3)), tol=1e-11).params)
    w = solve(1.3)
    forward = jax.jit(jax.jacfwd(solve))(1.3)
    reverse = jax.jit(jax.jacrev(solve))(1.3)

    full = lambda v: jnp.concatenate([v, jnp.zeros((2, 1))], axis=1)
    reduced = lambda v, s: loss(full(v), s)
    v = w[:, :2] - w[:, 2:]
    hessian = jax.hessian(reduced)(v, 1.3).reshape(4, 4)
    change = jax.jacfwd(jax.grad(reduced), argnums=1)(v, 1.3).reshape(4)
    expected = -np.linalg.solve(hessian, change).reshape(2, 2)
    assert np.max(np.abs(expected)) > 0.1
    for derivative in (forward, reverse):
        close(derivative[:, :2] - derivative[:, 2:], expected)
        close(jnp.sum(derivative, axis=1), 0)  # of all that do that, the smallest


@pytest.mark.usefixtures("x64")
def test_more_unknowns_than_rows():
    """From 0 the solution is the pseudo-inverse times b, and so is its derivative in b."""
    a, b = RANDOM.standard_normal((3, 7)), RANDOM.standard_normal(3)

    @jax.jit
    def solve(b):
        fun = lambda p: jnp.sum((a @ p - b) ** 2) / 2
        return minimize(fun, jnp.zeros(7), tol=1e-11).params

    close(solve(b), np.linalg.pinv(a) @ b)
    close(jax.jit(jax.jacfwd(solve))(b), np.linalg.pinv(a))
    close(jax.jit(jax.jacrev(solve))(b), np.linalg.pinv(a))


@pytest.mark.usefixtures("x64")
def test_an_unused_parameter():
    fun = lambda p, t: jnp.sum((p["used"] - t) ** 2) / 2
    start = {"used": jnp.zeros(2), "unused": jnp.ones(3)}
    solve = lambda t: minimize(lambda p: fun(p, t), start, tol=1e-9).params
    for derivative in (jax.jacfwd, jax.jacrev):
        moved = jax.jit(derivative(solve))(2.0)
        close(moved["used"], 1.0)
        close(moved["unused"], 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_group_l1_with_a_zero_group():
    target = jnp.array([[3.0, 4.0], [0.1, -0.2]])
    curvature = jnp.array([[1.0, 2.0], [1.0, 3.0]])

    @jax.jit
    def solve(strength, scale):
        fun = lambda p: jnp.sum(curvature * (p - scale * target) ** 2) / 2
        return minimize(fun, jnp.ones((2, 2)), prox=proximal.group_l1(strength), tol=1e-12).params

    assert np.all(solve(1.0, 1.0)[1] == 0)
    eps = 1e-5
    expected = (
        (solve(1.0 + eps, 1.0) - solve(1.0 - eps, 1.0)) / (2 * eps),
        (solve(1.0, 1.0 + eps) - solve(1.0, 1.0 - eps)) / (2 * eps),
    )
    for derivative in (jax.jacfwd, jax.jacrev):
        found = jax.jit(derivative(solve, argnums=(0, 1)))(1.0, 1.0)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
            assert np.all(ours[1] == 0)


@pytest.mark.usefixtures("x64")
def test_group_l1_with_a_scalar_leaf():
    """A scalar is one group: soft thresholding."""

    def solve(target, strength):
        fun = lambda p: (p["scalar"] - target) ** 2 / 2 + jnp.sum(p["row"] ** 2)
        start = {"scalar": jnp.zeros([]), "row": jnp.ones(2)}
        prox = proximal.group_l1(strength)
        return minimize(fun, start, prox=prox, tol=1e-10).params["scalar"]

    gradient = jax.jit(jax.grad(solve, argnums=(0, 1)))
    close(gradient(3.0, 1.0), (1.0, -1.0))
    close(gradient(0.5, 1.0), (0.0, 0.0))


NESTINGS = {
    f"{outer.__name__} of {inner.__name__}": (outer, inner)
    for outer in (jax.jacfwd, jax.jacrev)
    for inner in (jax.jacfwd, jax.jacrev)
}


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("penalized", [False, True])
def test_second_derivatives(nesting, penalized):
    """The minimizer of t exp(p) - 4 p + s |p| is log((4 - s) / t), while that is positive."""
    outer, inner = NESTINGS[nesting]

    def solve(point):
        t, s = point
        direct = 0.0 if penalized else s
        fun = lambda p: jnp.sum(t * jnp.exp(p) - (4 - direct) * p)
        prox = proximal.l1(s) if penalized else None
        return minimize(fun, jnp.ones(1), nag_jax.fista(0.2, prox=prox), prox=prox, tol=1e-12)

    closed = lambda point: jnp.log((4 - point[1:]) / point[:1])
    point = jnp.array([1.0, 0.8])
    found = jax.jit(outer(inner(lambda point: solve(point).params)))(point)
    close(found, jax.hessian(closed)(point), rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_third_derivative():
    solve = lambda t: minimize(lambda p: jnp.exp(p) - t * p, 1.0, nag_jax.fista(0.2), tol=1e-13)
    third = jax.jit(jax.grad(jax.grad(jax.grad(lambda t: solve(t).params))))
    close(third(3.0), 2 / 27, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_complex_solutions(strength):
    """l1 shrinks the modulus of c by the strength and keeps its phase."""
    c = jnp.array([1.0 + 2.0j, -0.1j, -3.0 + 0.5j])
    turn = lambda angle: jnp.exp(1j * angle) * c

    def solve(angle, strength):
        fun = lambda p: jnp.sum(jnp.abs(p - turn(angle)) ** 2) / 2
        prox = proximal.l1(strength) if strength is not None else None
        start = jnp.zeros(3, complex)
        return minimize(fun, start, nag_jax.fista(0.5, prox=prox), prox=prox, tol=1e-11).params

    def closed(angle, strength):
        z = turn(angle)
        return z / jnp.abs(z) * jnp.maximum(jnp.abs(z) - strength, 0)

    parts = lambda solve: lambda *args: jnp.stack([solve(*args).real, solve(*args).imag])
    if strength == 0:
        found = jax.jit(jax.jacfwd(parts(lambda angle: solve(angle, None))))(0.7)
        close(found, jax.jacfwd(parts(turn))(0.7))
        return
    expected = jax.jacfwd(parts(closed), argnums=(0, 1))(0.7, strength)
    for derivative in (jax.jacfwd, jax.jacrev):
        close(jax.jit(derivative(parts(solve), argnums=(0, 1)))(0.7, strength), expected)


def _closed_over(target):
    """The solution of a problem that takes integers, booleans, a key and a count by closure."""
    labels = jnp.arange(4) % 2
    mask = jnp.array([True, True, True, False])

    def solve(target, labels, mask, key, count):
        noise = jax.random.normal(key, (2,), target.dtype)

        def fun(p):
            errors = (p[labels] - target + noise[labels]) ** 2
            return jnp.sum(jnp.where(mask, errors, 0)) / count

        return minimize(fun, jnp.zeros(2), nag_jax.nag(0.3, 0.2), tol=1e-4).params

    return solve(target, labels, mask, jax.random.key(0), jnp.sum(mask))


def _scanned(target):
    """Twice in a scan, over rows of data, one of which is an integer."""
    step = lambda total, shift: (total + _closed_over(target + shift), None)
    return jax.lax.scan(step, jnp.zeros(2), jnp.arange(2))[0] / 2


AROUND = {
    "alone": _closed_over,
    "jit": jax.jit(_closed_over),
    "scan": _scanned,
    "remat": jax.remat(_closed_over),
    "vmap": lambda target: jax.vmap(_closed_over)(jnp.stack([target, target]))[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND)
def test_differentiated_from_outside(name):
    """The solution is the mean of the targets of each label where the mask is set."""
    target = jnp.array([1.0, 2.0, 3.0, 4.0])
    expected = [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]
    found = jax.jit(jax.jacrev(AROUND[name]))(target)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if name in ("alone", "scan"):
        np.testing.assert_allclose(jax.jit(jax.jacfwd(AROUND[name]))(target), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_stopped_early_it_returns_what_the_prox_returns(steps):
    """Entries that are exactly 0, and a point of the simplex."""
    a = jnp.asarray(np.random.default_rng(2).standard_normal((20, 8)), jnp.float32)
    b = a @ jnp.array([1.9, 0, 0, 1.5, 0, 0, 0, -2.0])
    fun = lambda p: jnp.sum((a @ p - b) ** 2) / 2
    simplex = proximal.projection(optax.projections.projection_simplex)
    for default in (True, False):
        for prox in (proximal.l1(15.0), simplex):
            tx = None if default else nag_jax.fista(0.01, prox=prox)
            result = minimize(fun, jnp.full(8, 0.3), tx, prox=prox, tol=0.0, max_steps=steps)
            assert reason(result) == "MAX_STEPS"
            assert 0 < np.sum(result.params == 0) < 8
        assert np.all(result.params >= 0)
        np.testing.assert_allclose(jnp.sum(result.params), 1, rtol=1e-6)


def test_derivatives_where_it_stopped_early():
    """Those of Newton's step from there: of this quadratic they do not depend on the point."""

    def solve(t):
        fun = lambda p: jnp.sum(jnp.array([1.0, 0.01]) * (p - t) ** 2)
        return minimize(fun, jnp.zeros(2), optax.sgd(0.1), max_steps=3).params

    params, moved = jax.jit(lambda t: jax.jvp(solve, (t,), (jnp.ones([]),)))(5.0)
    assert params[1] < 0.1
    np.testing.assert_allclose(moved, 1.0, rtol=1e-5)


def _squares(p):
    return jnp.sum((p - _squares.target) ** 2)


@pytest.mark.slow
def test_calls_outside_of_jit_compile_once_and_keep_no_data():
    """One function with new data at each call; new functions are dropped with their programs."""
    from nag_jax import _compiled

    optimizer = nag_jax.nag(0.1)

    def call(i):
        _squares.target = jnp.full(7, float(i))
        return minimize(_squares, jnp.full(7, 0.5 + i), optimizer, tol=1e-3 + i * 1e-5)

    call(0)
    assert programs.compilations(lambda: [call(i) for i in range(1, 21)]) == 0
    assert call(3).converged
    np.testing.assert_allclose(call(3).params, 3.0, atol=1e-2)
    data = weakref.ref(_squares.target)
    _squares.target = None
    gc.collect()
    assert data() is None

    def other(i):
        fun = lambda p: jnp.sum((p - i) ** 2)
        return minimize(fun, jnp.zeros(1), optimizer, max_steps=1)

    other(0)
    gc.collect()
    kept = len(_compiled._PROGRAMS)
    for i in range(3):
        other(i)
    gc.collect()
    assert len(_compiled._PROGRAMS) == kept


def test_one_function_keeps_few_programs():
    from nag_jax import _compiled

    fun = lambda p: jnp.sum(p**2)
    for n in range(1, 12):
        minimize(fun, jnp.ones(n), nag_jax.nag(0.1), max_steps=1)
    assert len(_compiled._PROGRAMS[fun]) == 8


EDGES = {
    "unbounded": (jnp.sum, jnp.zeros(2), "NOT_FINITE", False),
    "flat": (lambda p: jnp.sum(jnp.maximum(jnp.abs(p) - 1, 0)), jnp.zeros(2), "TOLERANCE", True),
    "constant": (lambda p: jnp.float32(3.0), jnp.ones(2), "TOLERANCE", True),
    "infinite start": (lambda p: jnp.sum(p**2), jnp.full(2, jnp.inf), "NOT_FINITE", False),
    "no parameters": (lambda p: jnp.float32(3.0), {}, "TOLERANCE", True),
    "a Python number": (lambda p: (p - 2) ** 2, 5, "TOLERANCE", True),
    "Python numbers": (lambda p: (p[0] - 2) ** 2 + p[1] ** 2, [5, 1.5], "TOLERANCE", True),
    "scaled by 1e30": (
        lambda p: 1e30 * jnp.sum(jnp.array([1.0, 0.3]) * (p - jnp.array([2.0, 2.1])) ** 2),
        jnp.ones(2),
        "TOLERANCE",
        True,
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    fun, start, expected, converged = EDGES[name]
    result = minimize(fun, start, max_steps=200)
    assert (reason(result), bool(result.converged)) == (expected, converged)
    if name != "infinite start":
        assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(result.params))
    if "number" in name:
        np.testing.assert_allclose(jax.tree.leaves(result.params)[0], 2.0, rtol=1e-5)
    if name == "scaled by 1e30":
        np.testing.assert_allclose(result.params, [2.0, 2.1], rtol=1e-6)


def test_as_many_steps_as_one_likes():
    fun = lambda p: jnp.sum((p - 2.0) ** 2)
    for max_steps in (10**10, np.int64(10**10)):
        assert minimize(fun, jnp.zeros(2), max_steps=max_steps).converged


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (jnp.arange(3), r"int32\[3\]; cast"),
        ({"w": jnp.ones(2), "steps": np.arange(2)}, r"int(32|64)\[2\] at \['steps'\]; cast"),
        (True, "bool"),
        ({"a": "text"}, r"'text' at \['a'\]"),
        (None, "None"),
    ],
)
def test_parameters_that_cannot_be_trained(start, named):
    with pytest.raises(ValueError, match=rf"^params must be .*{named}"):
        minimize(lambda p: jnp.float32(0.0), start)


def test_the_value_is_one_real_number():
    for y, got in ((jnp.ones(2), r"float32\[2\]"), (1j, "complex"), (jnp.int32(1), "int32")):
        with pytest.raises(ValueError, match=rf"^what fun returns must be .*{got}"):
            minimize(lambda p, y=y: y, jnp.ones(2))


def test_derivatives_that_do_not_exist_are_nan():
    def unbounded(t):
        return minimize(lambda p: t * p, 0.0, optax.sgd(1e38), max_steps=50)

    assert reason(unbounded(1.0)) == "NOT_FINITE"
    solve = lambda t: unbounded(t).params
    assert np.isnan(jax.jit(jax.grad(solve))(1.0))
    assert np.isnan(jax.jit(jax.jacfwd(solve))(1.0))

    # Flat along the second unknown: it can follow the first number, and not the second.
    def flat(t):
        fun = lambda p: (p[0] - t[0]) ** 2 / 2 + t[1] * p[1]
        return minimize(fun, jnp.array([0.0, 2.0]), optax.sgd(0.5)).params

    moved = jax.jit(jax.jacfwd(flat))(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(moved[:, 0], [1.0, 0.0], atol=1e-6)
    assert np.all(np.isnan(moved[:, 1]))


def test_the_start_and_the_optimizer_have_no_derivatives():
    def solve(start, rate):
        return minimize(lambda p: (p - 1.0) ** 2, start, optax.sgd(rate)).params

    assert jax.jit(jax.grad(solve, argnums=(0, 1)))(3.0, 0.1) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesting", NESTINGS)
def test_second_derivatives_through_a_scan(nesting):
    """Solutions i/(1 + t) for i = 1, 2, of which the sum has the second derivative 6/(1 + t)^3."""

    def solved(t, i):
        fun = lambda p: (p - i) ** 2 / 2 + t * p**2 / 2
        return minimize(fun, 0.0, tol=1e-11).params

    def total(t):
        return jax.lax.scan(lambda s, i: (s + solved(t, i), None), 0.0, jnp.arange(1.0, 3.0))[0]

    outer, inner = NESTINGS[nesting]
    if nesting == "jacfwd of jacrev" and jax.__version_info__ < (0, 12):
        with pytest.raises(TypeError, match="forward-mode"):
            outer(inner(total))(0.5)
    else:
        close(outer(inner(total))(0.5), 6 / 1.5**3)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_parameters_of_different_units(scale, mode):
    def solved(t):
        fun = lambda p: (scale * (p[0] - t) ** 2 + (p[1] - t) ** 2) / 2
        return minimize(fun, jnp.full(2, t), tol=1e-2).params

    np.testing.assert_allclose(mode(solved)(1.0), 1.0, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("n", [3, 100])
def test_parameters_in_bfloat16(n, mode):
    """No curvature between 0.1 and 1 is taken for rounding."""
    curvature = jnp.linspace(0.1, 1.0, n).astype(jnp.bfloat16)

    def solved(t):
        fun = lambda p: jnp.sum((curvature * (p - t) ** 2).astype(jnp.float32)) / 2
        return minimize(fun, jnp.ones(n, jnp.bfloat16), tol=1e-2).params.astype(jnp.float32)

    np.testing.assert_allclose(mode(solved)(jnp.float32(1.0)), 1.0, rtol=2e-2)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-20])
def test_small_objectives_with_a_prox(scale):
    """The rounding of params is larger than what the prox changes in a step of 1."""
    fun = lambda p: scale * jnp.sum(jnp.array([1.0, 0.1]) * (p - 1.5) ** 2)
    result = minimize(fun, jnp.zeros(2), prox=proximal.l1(0.1 * scale), tol=1e-5 * scale)
    assert reason(result) == "TOLERANCE"
    np.testing.assert_allclose(result.params, [1.45, 1.0], rtol=2e-4)


def test_the_number_of_steps_may_be_an_array():
    assert minimize(jnp.sum, jnp.zeros(2), max_steps=jnp.asarray(3)).steps <= 3
