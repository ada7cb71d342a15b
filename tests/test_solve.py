"""minimize: it finds the solution or says why not; jit, vmap and derivatives of the data."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import Reason, minimize, proximal, restart, rules

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((30, 6)) * np.logspace(0, -1, 6)
B = RANDOM.standard_normal(30)


def least_squares(p, a=A, b=B):
    a, b = a.astype(p.dtype), b.astype(p.dtype)  # constants of one dtype, whatever x64 is
    return jnp.sum((a @ p - b) ** 2) / 2


def reason(result):
    return Reason(int(result.reason)).name


def accelerated(learning_rate, rule=None):
    rule = rules.fista() if rule is None else rule
    kernel = nag_jax.accelerate(rule, restart=restart.gradient)
    return optax.chain(optax.sgd(learning_rate), kernel)


OPTIMIZERS = {
    "default": None,
    "nag": nag_jax.nag(0.02, 0.9),
    "ogm": accelerated(0.01, rules.ogm()),
    "gpa": optax.chain(optax.sgd(0.03), nag_jax.accelerate(rules.gpa(0.9, 0.8))),
    "adam": optax.adam(optax.exponential_decay(0.1, 100, 0.5)),
    "lbfgs": optax.lbfgs(),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finds_the_solution_with_any_optimizer(name):
    result = minimize(least_squares, jnp.zeros(6), OPTIMIZERS[name], tol=1e-8)
    assert result.converged
    assert reason(result) == "TOLERANCE"
    assert result.error <= 1e-8
    solution = np.linalg.lstsq(A, B)[0]
    np.testing.assert_allclose(result.params, solution, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.value, least_squares(solution), rtol=1e-10)
    assert 1 < result.steps < 10_000


def test_it_returns_the_iterate_of_an_outer_optimizer():
    """Seven steps into rounds of five it is where the round began, not where params are."""
    optimizer = nag_jax.lookahead(optax.sgd(0.01), every=5)
    seven, five = (minimize(least_squares, jnp.zeros(6), optimizer, max_steps=n) for n in (7, 5))
    np.testing.assert_array_equal(seven.params, five.params)
    plain = minimize(least_squares, jnp.zeros(6), optax.sgd(0.01), max_steps=7)
    assert np.max(np.abs(seven.params - plain.params)) > 1e-3


@pytest.mark.usefixtures("x64")
def test_constraints_from_an_infeasible_start():
    from scipy.optimize import nnls

    prox = proximal.nonnegative()
    result = minimize(least_squares, -5 * jnp.ones(6), prox=prox, tol=1e-9)
    assert result.converged
    np.testing.assert_allclose(result.params, nnls(A, B)[0], rtol=0, atol=1e-8)
    assert np.all(result.params >= -1e-15)
    # The gradient there is not small: only the error with the prox can tell that it is solved.
    assert np.linalg.norm(jax.grad(least_squares)(result.params)) > 0.1
    missing = minimize(least_squares, jnp.zeros(6), accelerated(0.01), prox=prox, tol=1e-9)
    assert not missing.converged


def test_too_few_steps():
    result = minimize(least_squares, jnp.zeros(6), max_steps=7)
    assert (reason(result), int(result.steps), bool(result.converged)) == ("MAX_STEPS", 7, False)
    again = minimize(least_squares, jnp.zeros(6), max_steps=8)
    assert again.value < result.value


def test_divergence_is_reported_with_the_last_finite_params():
    result = minimize(least_squares, jnp.zeros(6), nag_jax.nag(10.0))
    assert reason(result) == "NOT_FINITE"
    assert not result.converged
    assert np.all(np.isfinite(result.params))
    assert result.steps < 100


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_from_the_start(bad):
    for fun, start in (
        (lambda p: jnp.sum(p**2) * bad, jnp.ones(3)),
        (least_squares, jnp.full(6, bad)),
    ):
        result = minimize(fun, start, nag_jax.nag(0.01))
        assert reason(result) == "NOT_FINITE"
        assert int(result.steps) == 1
        default = minimize(fun, start)
        assert reason(default) == "NOT_FINITE"


def test_a_value_that_is_not_finite_is_not_a_success():
    """A gradient of zero with a value of NaN."""
    fun = lambda p: jnp.sum(p**2) + jax.lax.stop_gradient(jnp.nan)
    result = minimize(fun, jnp.zeros(3), nag_jax.nag(0.1))
    assert reason(result) == "TOLERANCE"
    assert not result.converged


@pytest.mark.filterwarnings("ignore:momentum 0.98 in a")  # FISTA's, below 32 bits
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_more_progress(dtype):
    """Far from 0 the gradient cannot become smaller than rounding lets it."""
    fun = lambda p: jnp.sum((p - 3.3) ** 2 * jnp.array([1.0, 0.3, 0.1], dtype))
    result = minimize(fun, jnp.zeros(3, dtype), accelerated(0.4), tol=1e-20, max_steps=5000)
    assert reason(result) in ("STEP_TOO_SMALL", "TOLERANCE")
    assert result.steps < 5000
    assert result.params.dtype == dtype
    np.testing.assert_allclose(result.params.astype(float), 3.3, rtol=2e-2)


def test_a_warm_up_from_zero_is_not_no_progress():
    rate = optax.linear_schedule(0.0, 0.01, 5)
    result = minimize(least_squares, jnp.zeros(6), accelerated(rate), tol=1e-3)
    assert result.converged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_precision(dtype):
    fun = lambda p: least_squares(p.astype(jnp.float32))
    result = minimize(fun, jnp.zeros(6, dtype), tol=1e-4 if dtype == "float32" else 0.3)
    assert result.converged
    assert result.params.dtype == dtype
    assert result.value < 1.02 * least_squares(np.linalg.lstsq(A, B)[0])


def test_trees():
    fun = lambda p: least_squares(jnp.concatenate([p["a"], p["b"][0]]))
    start = {"a": jnp.zeros(2), "b": [jnp.zeros(4), None], "empty": {}}
    result = minimize(fun, start, tol=1e-4)
    assert result.converged
    assert jax.tree.structure(result.params) == jax.tree.structure(start)
    whole = minimize(least_squares, jnp.zeros(6), tol=1e-4).params
    np.testing.assert_allclose(result.params["a"], whole[:2], atol=1e-3)
    for optimizer in (None, nag_jax.nag(0.1)):
        empty = minimize(lambda p: jnp.float32(3.0), {}, optimizer)
        assert (reason(empty), empty.params, float(empty.value)) == ("TOLERANCE", {}, 3.0)


@pytest.mark.usefixtures("x64")
def test_complex_params():
    target = jnp.asarray([1.0 + 2.0j, -0.5j])
    fun = lambda p: jnp.sum(jnp.abs(p - target) ** 2 * jnp.array([1.0, 0.2]))
    result = minimize(fun, jnp.zeros(2, complex), accelerated(0.4), tol=1e-8, implicit_diff=False)
    assert result.converged
    np.testing.assert_allclose(result.params, target, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_vmap_is_a_loop():
    """100 problems with other data each, one of which cannot be solved."""
    a, b = RANDOM.standard_normal((100, 12, 4)), RANDOM.standard_normal((100, 12))
    a[37] = np.nan
    start = RANDOM.standard_normal((100, 4))
    prox = proximal.l1(0.1)

    @jax.jit
    def solve(a, b, start):
        return minimize(lambda p: least_squares(p, a, b), start, prox=prox, tol=1e-8)

    mapped = jax.jit(jax.vmap(solve))(a, b, start)
    alone = [solve(*one) for one in zip(a, b, start, strict=True)]
    alone = jax.tree.map(lambda *rows: jnp.stack(rows), *alone)
    assert int(mapped.converged.sum()) == 99
    assert len(set(mapped.steps.tolist())) > 10
    np.testing.assert_array_equal(mapped.reason, alone.reason)
    assert Reason(int(mapped.reason[37])) == Reason.NOT_FINITE
    np.testing.assert_allclose(mapped.params, alone.params, rtol=0, atol=1e-7)
    # Where rounding decides about one step more or less, both are right.
    assert np.max(np.abs(mapped.steps - alone.steps)) <= 3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_the_data():
    """d solution / d data, by reverse and forward mode, against the closed form."""

    def solution(b, ridge):
        fun = lambda p: least_squares(p, b=b) + ridge * jnp.sum(p**2) / 2
        return minimize(fun, jnp.zeros(6), tol=1e-11).params

    closed = lambda b, ridge: jnp.linalg.solve(A.T @ A + ridge * jnp.eye(6), A.T @ b)
    where = (jnp.asarray(B), 0.3)
    for derivative in (jax.jacrev, jax.jacfwd):
        ours, theirs = (jax.jit(derivative(f, argnums=(0, 1)))(*where) for f in (solution, closed))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), ours, theirs
        )
    total = jax.jit(jax.vmap(jax.grad(lambda b: jnp.sum(solution(b, 0.3)))))
    expected = jax.grad(lambda b: jnp.sum(closed(b, 0.3)))(where[0])
    np.testing.assert_allclose(total(jnp.stack([where[0]] * 2))[1], expected, rtol=1e-6, atol=1e-8)
    start = jax.grad(lambda s: jnp.sum(minimize(least_squares, s, tol=1e-9).params))(jnp.ones(6))
    assert np.all(start == 0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_through_a_prox():
    """Of the lasso in its strength and its data, against differences of solutions."""

    def solution(strength, scale):
        fun = lambda p: least_squares(p, b=scale * B)
        return minimize(fun, jnp.zeros(6), prox=proximal.l1(strength), tol=1e-12).params

    where, eps = (1.0, 1.2), 1e-5
    up = jax.jit(jax.jacrev(solution, argnums=(0, 1)))(*where)
    forward = jax.jit(jax.jacfwd(solution, argnums=(0, 1)))(*where)
    solution = jax.jit(solution)
    assert 0 < int(np.sum(np.abs(solution(*where)) < 1e-9)) < 6
    for i in (0, 1):
        shift = [eps * (j == i) for j in (0, 1)]
        plus = solution(*(w + s for w, s in zip(where, shift, strict=True)))
        minus = solution(*(w - s for w, s in zip(where, shift, strict=True)))
        np.testing.assert_allclose(up[i], (plus - minus) / (2 * eps), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(forward[i], up[i], rtol=1e-6, atol=1e-8)


def test_without_implicit_differentiation_derivatives_are_zero():
    """A function that JAX cannot differentiate twice still works."""

    @jax.custom_vjp
    def once(p):
        return jnp.sum(p**2)

    def backward(p, g):
        return (jax.pure_callback(lambda p: 2 * np.asarray(p), p, p) * g,)

    once.defvjp(lambda p: (once(p), p), backward)
    solve = functools.partial(minimize, optimizer=nag_jax.nag(0.1), implicit_diff=False)
    assert solve(once, jnp.ones(2)).converged
    fun = lambda scale: jnp.sum(solve(lambda p: jnp.sum((p - scale) ** 2), jnp.ones(2)).params)
    assert jax.grad(fun)(3.0) == 0.0


def test_separable_logistic_regression_in_float32():
    """No minimum; jaxopt's default is NaN after 266 steps: here 10,000 are finite, monotone."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((80, 20))
    signs = np.sign(features @ (5 * rng.standard_normal(20)))
    margins = jnp.asarray(-signs[:, None] * features, jnp.float32)
    fun = lambda p: jnp.mean(jnp.logaddexp(jnp.float32(0), margins @ p))
    start = jnp.zeros(20, jnp.float32)
    result = minimize(fun, start, tol=0.0)
    assert np.all(np.isfinite(result.params))
    assert result.value < 1e-30
    known = accelerated(1 / nag_jax.largest_curvature(fun, start))
    for tx, end in ((nag_jax.backtracking(), 1e-30), (known, 1e-3)):
        optimizer = optax.with_extra_args_support(tx)

        def body(carry, _, optimizer=optimizer):
            params, state = carry
            value, g = jax.value_and_grad(fun)(params)
            updates, state = optimizer.update(g, state, params, value=value, grad=g, value_fn=fun)
            params = optax.apply_updates(params, updates)
            return (params, state), fun(nag_jax.eval_params(params, state))

        _, values = jax.lax.scan(body, (start, optimizer.init(start)), length=10_000)
        values = np.asarray(values)
        rounding = 4 * np.finfo(np.float32).eps * values[:-1]
        assert np.all(np.isfinite(values))
        assert values[-1] < end
        assert np.all(np.diff(values) <= rounding)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_more_gradients_than_jaxopt_on_the_problems_of_scikit_learn(dtype, x64):
    """Against the counts that benchmarks/convergence.py wrote: 1e-9, or 1e-6 in float32."""
    del x64
    pytest.importorskip("sklearn")
    from benchmarks import convex_problems

    path = Path(__file__).parent.parent / "benchmarks" / "results" / "convergence.json"
    counts = {
        (row["problem"], row["method"]): row["gradients"][-1]
        for row in json.loads(path.read_text())["rows"]
        if row["dtype"] == dtype
    }
    exact = {p.name: p for p in convex_problems.problems()}
    for problem in convex_problems.problems(jnp.dtype(dtype)):
        theirs = counts[problem.name, "jaxopt, line search"]
        assert counts[problem.name, "minimize (backtracking)"] <= theirs
        result = minimize(problem.loss, problem.start, prox=problem.prox, tol=0.0, max_steps=theirs)
        objective = exact[problem.name].objective
        low = objective(jnp.asarray(exact[problem.name].solve()))
        gap = objective(result.params.astype(jnp.float64)) - low
        assert gap <= (1e-9 if dtype == "float64" else 1e-6) * low, problem.name


def test_largest_curvature():
    hessian = A.T @ A
    largest = np.linalg.eigvalsh(hessian)[-1]
    for params in (jnp.zeros(6), 7 * jnp.ones(6)):
        estimate = float(nag_jax.largest_curvature(least_squares, params))
        assert largest <= estimate <= 1.03 * largest
    features = RANDOM.standard_normal((40, 5))
    logistic = lambda p: jnp.mean(jnp.logaddexp(0.0, features @ p["w"] + p["b"]))
    estimate = nag_jax.largest_curvature(logistic, {"w": jnp.zeros(5), "b": jnp.zeros([])})
    design = np.c_[features, np.ones(40)]
    bound = np.linalg.norm(design, 2) ** 2 / 160
    assert bound <= estimate <= 1.03 * bound
    assert nag_jax.largest_curvature(jnp.sum, jnp.ones(3)) == 1.0
    assert nag_jax.largest_curvature(lambda p: jnp.float32(0.0), {}) == 1.0


def test_errors():
    with pytest.raises(ValueError, match=r"tol must be in \[0, inf\), got -1"):
        minimize(least_squares, jnp.zeros(6), tol=-1.0)
    with pytest.raises(ValueError, match=r"max_steps must be an int of at least 1, got 0"):
        minimize(least_squares, jnp.zeros(6), max_steps=0)
    with pytest.raises(ValueError, match=r"optimizer must be an optax.Gradient.* got 'adam'"):
        minimize(least_squares, jnp.zeros(6), "adam")
    with pytest.raises(ValueError, match=r"wrap it in proximal\.projection"):
        minimize(least_squares, jnp.zeros(6), prox=optax.projections.projection_simplex)
    with pytest.raises(ValueError, match=r"max_steps must be an int"):
        nag_jax.largest_curvature(least_squares, jnp.zeros(6), max_steps=0)


def test_arguments_of_the_objective_and_their_derivatives():
    def fun(p, a, *, penalty):
        return least_squares(p, a) + penalty * jnp.sum(p**2)

    def solution(a, penalty):
        return minimize(fun, jnp.zeros(6), args=(a,), kwargs={"penalty": penalty}, tol=1e-4)

    closed = minimize(lambda p: fun(p, A, penalty=0.3), jnp.zeros(6), tol=1e-4)
    np.testing.assert_array_equal(solution(A, 0.3).params, closed.params)
    slope = jax.jacfwd(lambda s: solution(jnp.asarray(A), s).params)(0.3)
    step = 1e-2
    around = [solution(A, 0.3 + by).params for by in (step, -step)]
    np.testing.assert_allclose(slope, (around[0] - around[1]) / (2 * step), rtol=0.05, atol=1e-3)


def test_aux_is_that_of_the_result():
    fun = lambda p: (least_squares(p), {"residual": A @ p - B})
    result = jax.jit(lambda p: minimize(fun, p, has_aux=True, tol=1e-4))(jnp.zeros(6))
    assert result.converged
    np.testing.assert_allclose(result.aux["residual"], A @ result.params - B, atol=1e-5)
    with pytest.raises(ValueError, match=r"with has_aux fun must return a pair \(scalar, aux\)"):
        minimize(least_squares, jnp.zeros(6), has_aux=True)


def test_the_history_has_an_entry_for_each_step():
    run = lambda p: minimize(least_squares, p, tol=1e-4, max_steps=500, history=True)
    result = jax.jit(run)(jnp.zeros(6))
    values, errors = result.history
    steps = int(result.steps)
    assert values.shape == errors.shape == (500,)
    assert np.all(np.isfinite(values[:steps]) & np.isfinite(errors[:steps]))
    assert np.all(np.isnan(values[steps:]) & np.isnan(errors[steps:]))
    assert values[0] == least_squares(jnp.zeros(6))
    assert errors[steps - 1] == result.error
    many = jax.vmap(run)(jnp.stack([jnp.zeros(6), jnp.ones(6)]))
    for batched, k in zip(many.history.values, many.steps, strict=True):
        assert np.sum(np.isfinite(batched)) == k
    assert minimize(least_squares, jnp.zeros(6)).history == ()


def test_an_error_of_your_own():
    distance = lambda p: jnp.max(jnp.abs(p - np.linalg.lstsq(A, B)[0]))
    result = minimize(least_squares, jnp.zeros(6), error=distance, tol=0.01)
    assert result.converged
    assert distance(result.params) == result.error
    assert minimize(least_squares, jnp.zeros(6), error=distance, tol=0.1).steps < result.steps
    broken = minimize(least_squares, jnp.zeros(6), error=lambda p: jnp.nan)
    assert reason(broken) == "NOT_FINITE"


def test_new_arguments_are_checked():
    for arguments, message in (
        (dict(args=[1.0]), r"args must be a tuple, got list; for one argument give args=\(x,\)"),
        (dict(error=0.1), "error must be a function of params or None, got 0.1"),
        (dict(error=lambda p: p), "what error returns must be a real scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            minimize(least_squares, jnp.zeros(6), **arguments)
    with pytest.raises(ValueError, match="max_steps must be an int with history=True"):
        jax.jit(lambda n: minimize(least_squares, jnp.zeros(6), history=True, max_steps=n).history)(
            jnp.array(5)
        )
