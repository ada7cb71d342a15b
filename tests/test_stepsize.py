"""Backtracking: its NumPy reference step by step, its certificate, and what rounding does to it."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import expit

import nag_jax
from nag_jax import proximal
from tests import reference


def quadratic(kappa, n=40):
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))
    hessian = (basis * np.logspace(np.log10(10.0 / kappa), 1, n)) @ basis.T
    solution = np.random.default_rng(2).standard_normal(n)
    value = lambda x: 0.5 * (x - solution) @ hessian @ (x - solution)
    return value, lambda x: hessian @ (x - solution), solution


def logistic(ridge):
    rng = np.random.default_rng(3)
    features = rng.standard_normal((80, 20)) * np.logspace(0, -2, 20)
    signs = np.sign(features @ (5 * rng.standard_normal(20)) + 0.3 * rng.standard_normal(80))
    margins = -signs[:, None] * features
    value = lambda x: jnp.mean(jnp.logaddexp(0.0, margins @ x)) + 0.5 * ridge * x @ x
    numpy_value = lambda x: np.mean(np.logaddexp(0.0, margins @ x)) + 0.5 * ridge * x @ x
    gradient = lambda x: margins.T @ expit(margins @ x) / 80 + ridge * x
    x = np.zeros(20)
    for _ in range(50):
        p = expit(margins @ x)
        hessian = (margins.T * (p * (1 - p))) @ margins / 80 + ridge * np.eye(20)
        x = x - np.linalg.solve(hessian, gradient(x))
    assert np.linalg.norm(gradient(x)) < 1e-12
    return value, numpy_value, gradient, x


def trajectory(optimizer, value, start, steps):
    """Params, iterates and carries after each call, in one scan."""

    def body(carry, _):
        params, state = carry
        f, g = jax.value_and_grad(value)(params)
        updates, state = optimizer.update(g, state, params, value=f, grad=g, value_fn=value)
        params = optax.apply_updates(params, updates)
        fired = optax.tree.get(state, "restarts", 0)
        return (params, state), (params, nag_jax.eval_params(params, state), state, fired)

    start = jnp.asarray(start)
    run = lambda carry: jax.lax.scan(body, carry, length=steps)[1]
    return jax.jit(run)((start, optimizer.init(start)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("restart", ["gradient", None])
@pytest.mark.parametrize("name", ["quadratic", "logistic", "lasso"])
def test_equals_the_reference(name, restart):
    prox = numpy_prox = None
    if name == "logistic":
        value, numpy_value, gradient, _ = logistic(1e-2)
        start, steps = np.zeros(20), 60
    else:
        value, gradient, _ = quadratic(100.0)
        numpy_value, start, steps = value, np.zeros(40), 80
    if name == "lasso":
        prox = proximal.l1(0.2)
        numpy_prox = lambda z, lr: np.sign(z) * np.maximum(np.abs(z) - 0.2 * lr, 0)
    optimizer = nag_jax.backtracking(prox, initial=1e-3, restart=restart)
    ys, xs, carries, fired = trajectory(optimizer, value, start, steps)
    expected = reference.fista_backtracking(
        numpy_value, gradient, start, steps, initial=1e-3, restart=bool(restart), prox=numpy_prox
    )
    y, x, lr, _, events = zip(*expected, strict=True)
    np.testing.assert_allclose(carries.learning_rate, lr, rtol=1e-10)
    np.testing.assert_allclose(ys, y, rtol=0, atol=1e-10)
    np.testing.assert_allclose(xs, x, rtol=0, atol=1e-10)
    assert carries.retries[-1] == events.count("retry") >= 2
    assert carries.accepted[-1] == steps - events.count("retry")
    if restart:
        assert fired[-1] == events.count("restart") >= 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["1e6", "1e4", "logistic"])
def test_certificate(name):
    """f(x_k) - f* <= R^2/(2 lr_k t_k^2): with the corrected t, and not with FISTA's own."""
    if name == "logistic":
        value, numpy_value, _, solution = logistic(1e-5)
    else:
        value, _, solution = quadratic(float(name))
        numpy_value = value
    optimizer = nag_jax.backtracking(initial=1e-4, restart=None)
    _, xs, carries, _ = trajectory(optimizer, value, np.zeros_like(solution), 600)
    # t'(t' - 1) lr' is t_k^2 lr_k, also after a retry, which leaves x_k where it was.
    mass = carries.t * (carries.t - 1) * carries.learning_rate
    gap = np.array([numpy_value(np.asarray(x)) for x in xs]) - numpy_value(solution)
    bound = solution @ solution / (2 * np.asarray(mass))
    assert np.max(gap / bound) <= 1 + 1e-6
    assert np.max(gap / bound) > 1e-3
    assert carries.retries[-1] >= 3


@pytest.mark.usefixtures("x64")
def test_plain_t_breaks_the_certificate():
    """The twin that must fail: FISTA's own t under the same growth of the step."""
    curvature = np.logspace(-6, 0, 40)
    x = y = np.zeros(40)
    lr, t, worst = 1e-6, 1.0, 0.0
    for _ in range(300):
        after = y - lr * curvature * (y - 1)
        gap = np.sum(curvature * (after - 1) ** 2) / 2
        worst = max(worst, gap / (40 / (2 * lr * t**2)))
        new = (1 + np.sqrt(1 + 4 * t**2)) / 2
        x, y, t = after, after + (t - 1) / new * (after - x), new
        lr = min(1.1 * lr, 1.0)
    assert worst > 2


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_rounding_causes_no_false_failures(shift):
    """Near the optimum in float32, where differences of values are noise, and far beyond it."""
    _, gradient, solution = quadratic(100.0)
    hessian = jnp.asarray(np.stack([gradient(e + solution) for e in np.eye(40)]), jnp.float32)
    solution = jnp.asarray(solution, jnp.float32)
    value = lambda x: (x - solution) @ hessian @ (x - solution) / 2 + jnp.float32(shift)
    _, xs, carries, _ = trajectory(nag_jax.backtracking(), value, jnp.zeros(40), 2000)
    rates = np.asarray(carries.learning_rate)
    assert np.all((rates > 0.03) & (rates < 3.0))  # L is 10, and 0.1 the least curvature
    assert carries.retries[-1] < 100
    gap = jnp.linalg.norm(hessian @ (xs[-1] - solution))
    assert gap < 1e-4 * jnp.linalg.norm(hessian @ solution)


def test_never_grows_beyond_what_is_finite():
    """A linear loss passes every test; so does one that is 0."""
    for value in (lambda p: jnp.sum(p), lambda p: 0 * jnp.sum(p)):
        _, _, carries, _ = trajectory(nag_jax.backtracking(), value, jnp.ones(3), 3000)
        assert np.all(np.isfinite(carries.learning_rate))
        assert np.all(np.isfinite(carries.t))
        assert np.all(carries.t >= 1)


PARAMS = {"a": jnp.linspace(-1.0, 1.0, 8).reshape(8, 1), "b": [jnp.float32(0.5), None], "c": {}}


def loss(params):
    return jnp.sum(jnp.abs(params["a"] - 0.3) ** 2) + 4 * jnp.abs(params["b"][0] + 1) ** 2


def step_of(optimizer):
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        g = jax.tree.map(jnp.conj, g)
        updates, state = optimizer.update(g, state, params, value=value, grad=g, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_state_is_stable_and_the_minimum_is_found(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    optimizer = nag_jax.backtracking()
    step, state = step_of(optimizer), optimizer.init(params)
    body = lambda carry, _: (step(*carry), None)
    after, end = jax.lax.scan(body, (params, state), length=50)[0]
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types((after, end)) == types((params, state))
    assert loss(nag_jax.eval_params(after, end)) < 1e-3 * loss(params)


def test_one_compilation_donated_without_a_copy_left():
    optimizer = nag_jax.backtracking(proximal.l1(0.01))
    counted = chex.assert_max_traces(step_of(optimizer), n=1)
    step = jax.jit(counted, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = optimizer.init(params)
    for _ in range(5):
        old = params["a"], state.m["a"]
        params, state = step(params, state)
        assert all(x.is_deleted() for x in old)
    eager, start = PARAMS, optimizer.init(PARAMS)
    for _ in range(5):
        eager, start = step_of(optimizer)(eager, start)
    chex.assert_trees_all_close(eager, params, atol=1e-6)


def test_a_parameter_without_a_gradient_stays():
    optimizer = nag_jax.backtracking(initial=1.0)
    value = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"])
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    g = {"a": 2 * params["a"], "b": None}
    arguments = dict(value=value(params), grad=g, value_fn=value)
    updates, state = optimizer.update(g, optimizer.init(params), params, **arguments)
    assert updates["b"] is None
    np.testing.assert_array_equal(state.m["b"], 0)
    np.testing.assert_allclose(updates["a"], -1.0)


def test_errors():
    for arguments, message in (
        (dict(initial=0.0), "initial must be in (0, inf), got 0"),
        (dict(grow=0.9), "grow must be in [1, inf), got 0.9"),
        (dict(shrink=1.0), "shrink must be in (0, 1), got 1"),
        (dict(restart="sometimes"), "'value', 'speed', a condition such as"),
        (dict(restart=3), "or None for never, got 3"),
        (dict(prox=optax.projections.projection_simplex), "wrap it in proximal.projection"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            nag_jax.backtracking(**arguments)
    optimizer = nag_jax.backtracking()
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"backtracking needs params, value and value_fn: call"):
        optimizer.update(PARAMS, state, PARAMS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["backtracking", "adanag", "minimize"])
def test_units_do_not_matter(method):
    """f -> c f and x -> c x, over 12 orders of magnitude each: iterations change by under 10 %."""
    value, _, _ = quadratic(1e3)
    start = jnp.zeros(40)

    @jax.jit
    def steps(of_value, of_x):
        scaled = lambda p: of_value * value(p / of_x)
        if method == "minimize":
            tol = 1e-6 * of_value / of_x  # of the gradient's norm
            return nag_jax.minimize(scaled, start, tol=tol).steps
        optimizer = getattr(nag_jax, method)()

        def body(carry, _):
            params, state = carry
            f, g = jax.value_and_grad(scaled)(params)
            updates, state = optimizer.update(g, state, params, value=f, grad=g, value_fn=scaled)
            params = optax.apply_updates(params, updates)
            x = nag_jax.eval_params(params, state) / of_x
            return (params, state), value(x)

        _, gaps = jax.lax.scan(body, (start, optimizer.init(start)), length=600)
        return jnp.argmax(gaps < 1e-6 * value(start))

    scales = 10.0 ** np.arange(-6, 7, 2)
    counts = [int(steps(c, 1.0)) for c in scales] + [int(steps(1.0, c)) for c in scales]
    assert min(counts) > 50
    assert max(counts) < 1.1 * min(counts)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [
    nag_jax.backtracking,
    functools.partial(nag_jax.backtracking, proximal.l1(1e-2), restart="value"),
    nag_jax.adanag,
    functools.partial(nag_jax.nag_auto, evaluate="iterate"),
], ids=["backtracking", "prox", "adanag", "nag_auto"])  # fmt: skip
def test_inside_shard_map_steps_are_those_of_one_device(make):
    """A leaf in eighths and a whole one: inner products over devices, each number once."""
    curvature = {"rows": jnp.geomspace(1e-2, 1.0, 16), "whole": jnp.array([0.5, 5.0])}
    specs = {"rows": PartitionSpec("data"), "whole": PartitionSpec()}

    def run(optimizer, over_devices, params, curvature):
        def value(params):
            each = jax.tree.map(lambda c, p: jnp.sum(c * (p - 1) ** 2) / 2, curvature, params)
            return over_devices(each["rows"]) + each["whole"]

        def step(carry, _):
            params, state = carry
            g = jax.tree.map(lambda c, p: c * (p - 1), curvature, params)
            updates, state = optimizer.update(
                g, state, params, value=value(params), grad=g, value_fn=value
            )
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
        return params, optax.tree.get(state, "learning_rate")[None]

    def sharded(optimizer, over_devices, check_vma=True):
        rate = PartitionSpec() if check_vma else PartitionSpec("data")
        return jax.jit(jax.shard_map(
            functools.partial(run, optimizer, over_devices),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(specs, specs), out_specs=(specs, rate), check_vma=check_vma,
        ))(jax.tree.map(jnp.zeros_like, curvature), curvature)  # fmt: skip

    start = jax.tree.map(jnp.zeros_like, curvature)
    alone = lambda x: x
    expected = jax.jit(functools.partial(run, make(), alone))(start, curvature)
    actual = sharded(make(axis_name="data"), lambda x: jax.lax.psum(x, "data"))
    chex.assert_trees_all_close(actual, expected, rtol=1e-9)
    _, rates = sharded(make(), alone, check_vma=False)
    assert np.ptp(rates) > 1e-3 * np.mean(rates)


def test_outside_of_jit_nothing_is_compiled_anew():
    """The search runs as a Python loop there: its values are numbers, and are counted."""
    traced = []

    def value(p):
        traced.append(isinstance(p, jax.core.Tracer))
        return jnp.sum(p**2)

    optimizer, params = nag_jax.backtracking(initial=100.0), jnp.ones(3)
    state = optimizer.init(params)
    for _ in range(3):
        arguments = dict(value=jnp.sum(params**2), value_fn=value)
        updates, state = optimizer.update(2 * params, state, params, **arguments)
        params = params + updates
    assert not any(traced)
    assert state.values == len(traced) > 8
