"""POGM and OptISTA: equal to their papers, within their bounds, and what comes after step N."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from test_proximal import LIPSCHITZ, A, B, Composite, smooth, soft, trajectory

import nag_jax
from nag_jax import proximal, rules

METHODS = {"pogm": nag_jax.pogm, "optista": nag_jax.optista}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
L1 = proximal.l1(0.3)
RATE = 1 / LIPSCHITZ


def shrink(z, step):
    return soft(z, 0.3 * step)


def lasso_gradient(x):
    return A.T @ (A @ x - B)


def proximal_descent(x, steps, rate=RATE):
    xs = [x]
    for _ in range(steps):
        xs.append(shrink(xs[-1] - rate * lasso_gradient(xs[-1]), rate))
    return np.stack(xs)


def rates(step, xp=np):
    """A learning rate that moves."""
    return RATE * (1 - 0.5 * xp.sin(step / 5.0) ** 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 60])
def test_pogm_is_the_paper(horizon, scheduled):
    """Its three sequences are one buffer; after the horizon it is proximal gradient descent."""
    rate = rates if scheduled else lambda step: RATE
    expected = reference.pogm(lasso_gradient, shrink, np.zeros(25), rate, horizon)
    rate = (lambda step: rates(step, jnp)) if scheduled else RATE
    ys, xs = trajectory(nag_jax.pogm(rate, L1, horizon=horizon), np.zeros(25), horizon + 20)
    np.testing.assert_array_equal(ys, xs)
    np.testing.assert_allclose(xs[: horizon + 1], expected, rtol=0, atol=1e-12)
    if not scheduled:
        after = proximal_descent(expected[-1], 20)
        np.testing.assert_allclose(xs[horizon:], after, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 60])
def test_optista_is_the_paper(horizon, scheduled):
    """Params are x and params + m are y, one in the end; then it is proximal gradient descent."""
    rate = rates if scheduled else lambda step: RATE
    xs, ys = reference.optista(lasso_gradient, shrink, np.zeros(25), rate, horizon)
    rate = (lambda step: rates(step, jnp)) if scheduled else RATE
    tx = nag_jax.optista(rate, L1, horizon=horizon)
    params, evaluated = trajectory(tx, np.zeros(25), horizon + 20)
    np.testing.assert_array_equal(params, evaluated)
    np.testing.assert_allclose(params[: horizon + 1], xs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(xs[-1], ys[-1], rtol=0, atol=1e-12)
    offset = lambda params, state: optax.tree.get(state, "m") + params
    _, proximal_points = trajectory(tx, np.zeros(25), horizon, read=offset)
    np.testing.assert_allclose(proximal_points, ys, rtol=0, atol=1e-12)
    if not scheduled:
        after = proximal_descent(ys[-1], 20)
        np.testing.assert_allclose(params[horizon:], after, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@every_method
def test_without_a_penalty_it_is_ogm(make):
    ogm = optax.chain(optax.sgd(RATE), nag_jax.accelerate(rules.ogm(40)))
    expected, _ = trajectory(ogm, np.ones(25), 40)
    ys, _ = trajectory(make(RATE, lambda tree, step: tree, horizon=40), np.ones(25), 40)
    np.testing.assert_allclose(ys, expected, rtol=0, atol=1e-12)


class Hard:
    """The lasso and slopes c*x over x >= 0 from 1, L = 1, side by side: methods see scalars only.

    A slope is hardest for a method that walks c*s in N steps where c = 1/(2*s).
    """

    def __init__(self, slopes):
        self.slopes = np.array(slopes)
        self.start = (jnp.zeros(25), jnp.ones(len(slopes)))

    def prox(self, tree, step):
        x, z = tree
        return proximal.l1(0.1 / LIPSCHITZ)(x, step), jnp.maximum(z, 0)

    def gradient(self, params):
        return lasso_gradient(params[0]) / LIPSCHITZ, jnp.asarray(self.slopes)

    def worst(self, optimizer, steps, bound, solution):
        """max over the problems of (F(x_N) - F*) / (bound * R^2)."""

        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(self.gradient(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[0])
        x, z = nag_jax.eval_params(*run((self.start, optimizer.init(self.start))))
        total = lambda x: (np.sum((A @ x - B) ** 2) / 2 + 0.1 * np.abs(x).sum()) / LIPSCHITZ
        lasso = (total(np.asarray(x)) - total(solution)) / np.sum(solution**2)
        return max(lasso, *(self.slopes * np.asarray(z))) / bound

    def chain(self, rule):
        return optax.chain(proximal.prox_step(self.prox, 1.0), nag_jax.accelerate(rule))


@pytest.fixture(scope="module")
def solution():
    jax.config.update("jax_enable_x64", True)
    yield Composite().solution()
    jax.config.update("jax_enable_x64", False)


DESCENT = rules.constant(rules.Coefficients(beta=0.0, kappa=0.0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [1, 2, 5, 40])
def test_the_bound_of_optista_is_tight(horizon, solution):
    last = reference.optimized_t(horizon)[-1]
    hard = Hard([0.02, 0.05, 0.1, 0.3, 1 / (last**2 - 1)])
    worst = functools.partial(
        hard.worst, steps=horizon, bound=1 / (2 * (last**2 - 1)), solution=solution
    )
    assert 0.999 < worst(nag_jax.optista(1.0, hard.prox, horizon=horizon)) <= 1 + 1e-9
    assert worst(hard.chain(rules.fista())) > 1.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [5, 20, 40])
def test_pogm_keeps_its_bound(horizon, solution):
    """Found numerically; for four steps and fewer, proximal gradient descent keeps it, too."""
    last = reference.optimized_t(horizon)[-1]
    hard = Hard([0.02, 0.05, 0.1, 0.3, 1 / (last**2 - 1), 1 / (2 * horizon)])
    worst = functools.partial(hard.worst, steps=horizon, bound=1 / horizon**2, solution=solution)
    assert 0.48 < worst(nag_jax.pogm(1.0, hard.prox, horizon=horizon)) <= 1 + 1e-9
    assert worst(hard.chain(DESCENT)) > 1.1
    if horizon > 5:
        assert worst(hard.chain(rules.fista())) > 1.1


@pytest.mark.usefixtures("x64")
@every_method
def test_minimize_ends_on_the_last_iterate_and_goes_on_beyond(make):
    optimizer = make(RATE, L1, horizon=50)
    solve = functools.partial(nag_jax.minimize, smooth, jnp.zeros(25), optimizer, prox=L1)
    result = solve(tol=0.0, max_steps=50)
    method = getattr(reference, make.__name__)
    expected = method(lasso_gradient, shrink, np.zeros(25), lambda step: RATE, 50)
    expected = expected if make is nag_jax.pogm else expected[0]
    np.testing.assert_allclose(result.params, expected[-1], rtol=0, atol=1e-12)
    assert (int(result.steps), int(result.reason)) == (50, nag_jax.Reason.MAX_STEPS)
    longer = solve(tol=1e-8)
    assert longer.converged
    assert longer.steps > 50
    low = nag_jax.minimize(smooth, jnp.zeros(25), prox=L1, tol=1e-10)
    total = lambda x: smooth(x) + 0.3 * jnp.sum(jnp.abs(x))
    assert total(longer.params) <= total(low.params) + 1e-10


@every_method
def test_gradients_are_taken_where_the_constraint_holds(make):
    """FISTA leaves it; at the end zeros are exact, and POGM's are at every step."""
    target, curvatures = jnp.array([1.0, -1.0, 0.2, -0.5]), jnp.array([0.1, 0.1, 1.0, 0.3])
    fun = lambda p: jnp.sum(curvatures * (p - target) ** 2) / 2
    start = jnp.array([0.0, 2.0, 1.0, 0.5])
    tx = make(1.0, proximal.nonnegative(), horizon=30)
    params, _ = trajectory(tx, start, 40, fun)
    np.testing.assert_array_less(-1e-6, params)
    np.testing.assert_array_equal(params[30:, [1, 3]], 0)
    assert np.any(params[1:30] == 0) == (make is nag_jax.pogm)
    np.testing.assert_allclose(params[30], [1.0, 0.0, 0.2, 0.0], atol=2e-2)
    fista = nag_jax.fista(1.0, proximal.nonnegative(), restart=None)
    assert np.min(trajectory(fista, start, 30, fun)[0]) < -0.05


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [2, 100])
def test_params_of_optista_are_means_of_its_proximal_points(horizon):
    """With a prox that leads from one unit vector to the next, params hold the weights."""
    basis = jnp.eye(horizon + 1)

    def step(carry, following):
        params, state = carry
        tx = nag_jax.optista(1.0, lambda tree, step: following, horizon=horizon)
        updates, state = tx.update(jnp.zeros(horizon + 1), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    init = nag_jax.optista(1.0, L1, horizon=horizon).init(basis[0])
    _, weights = jax.lax.scan(step, (basis[0], init), basis[1:])
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=0, atol=1e-12)
    assert np.min(weights) > -1e-12
    np.testing.assert_allclose(weights[-1], basis[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optista_keeps_what_params_round_away(dtype):
    """With a constant slope y_N is exact, whatever x was rounded to on the way."""
    horizon, slope = 100, 1e-5
    tx = nag_jax.optista(1.0, lambda tree, step: tree, horizon=horizon)
    start = jnp.ones(3, dtype)
    body = lambda carry, _: (
        (lambda u, s: (optax.apply_updates(carry[0], u), s))(
            *tx.update(jnp.full(3, slope, jnp.float32), carry[1], carry[0])
        ),
        None,
    )
    (params, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=horizon)
    walked = (reference.optimized_t(horizon)[-1] ** 2 - 1) / 2 * slope
    tolerance = {"float32": 1e-6, "bfloat16": 2.0**-9}[dtype]
    np.testing.assert_allclose(params.astype(float), 1 - walked, rtol=0, atol=tolerance)


@every_method
def test_leaves_without_a_gradient_stay(make):
    tx = make(0.1, proximal.l1(0.1), horizon=5)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    updates, new = tx.update({"a": jnp.ones(2), "b": None}, state, params)
    assert updates["b"] is None
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert np.all(np.asarray(new.m["b"]) == 0)


@every_method
def test_the_count_of_steps_does_not_wrap(make):
    """After the last step that int32 can count it still is proximal gradient descent."""
    tx, params = make(0.1, L1, horizon=3), jnp.array([1.0, -2.0])
    last = jnp.asarray(np.iinfo(np.int32).max, jnp.int32)
    state = tx.init(params)._replace(steps=last)
    for _ in range(2):
        updates, state = tx.update(jnp.ones(2), state, params)
        np.testing.assert_allclose(updates, [-0.13, -0.07], rtol=1e-5)
        assert state.steps == last
        assert state.steps.dtype == last.dtype


BAD = {
    "zero": (dict(horizon=0), r"horizon must be an int of at least 1, got 0"),
    "half": (dict(horizon=2.5), r"horizon must be an int .* got 2.5; .*static_args"),
    "schedule": (dict(horizon=lambda step: 5), r"horizon must be an int of at least 1"),
    "rate": (dict(learning_rate=-0.1), r"learning_rate must be in \[0, inf\), got -0.1"),
    "prox": (dict(prox=0.5), r"prox must be a function \(tree, step\) -> tree, got 0.5"),
    "projection": (
        dict(prox=optax.projections.projection_simplex),
        r"wrap it in proximal\.projection",
    ),
}


@every_method
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(make, name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make(**(dict(learning_rate=0.1, prox=L1, horizon=5) | arguments))


@every_method
def test_what_update_needs(make):
    tx = make(0.1, L1, horizon=np.int64(5))
    with pytest.raises(ValueError, match=rf"{make.__name__} needs params: call optimizer\.update"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    injected = optax.inject_hyperparams(make, static_args="prox")
    with pytest.raises(ValueError, match=r"name it in static_args"):
        injected(0.1, L1, horizon=5).init(jnp.ones(2))
