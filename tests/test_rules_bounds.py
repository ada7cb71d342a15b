"""Published worst-case bounds hold on the hard problems; where a method must fail, it does."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import nag_jax
from nag_jax import rules

STEPS = 40
SLACK = 1 + 1e-9  # of rounding; every ratio is to the bound itself
pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(eq=False, frozen=True)
class Problem:  # compared by identity, so that trajectories can be cached
    value: Callable
    gradient: Callable
    solution: np.ndarray
    start: np.ndarray

    def __iter__(self):
        return iter((self.value, self.gradient, self.solution, self.start))


def tridiagonal(half):
    """Nesterov's worst function, L = 1, in dimension 2*half + 1."""
    d = 2 * half + 1
    a = 2 * np.eye(d) - np.eye(d, k=1) - np.eye(d, k=-1)
    first = np.eye(d)[0]
    solution = 1 - np.arange(1, d + 1) / (d + 1)
    value = lambda x: (x @ a @ x / 2 - x[0]) / 4
    low = value(solution)
    gradient = lambda x: (a @ x - first) / 4
    return Problem(lambda x: value(x) - low, gradient, solution, np.zeros(d))


def huber(eps):
    value = lambda x: float(np.where(abs(x) <= eps, x**2 / 2, eps * abs(x) - eps**2 / 2)[0])
    return Problem(value, lambda x: jnp.clip(x, -eps, eps), np.zeros(1), np.ones(1))


def quadratic(curvatures):
    n = len(curvatures)
    q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))
    hessian, solution = q * curvatures @ q.T, np.random.default_rng(2).standard_normal(n)
    value = lambda x: (x - solution) @ hessian @ (x - solution) / 2
    return Problem(value, lambda x: hessian @ (x - solution), solution, np.zeros(n))


CONVEX = (
    *map(tridiagonal, (10, 40)),
    *map(huber, (0.3, 0.05, 0.02, 0.01)),
    quadratic(np.concatenate([[0.0], np.logspace(-4, 0, 11)])),
)
strong = functools.cache(lambda q: (quadratic(np.logspace(np.log10(q), 0, 12)),))


def run(optimizer, problems, steps=STEPS):
    """Params and evaluated iterates of all problems at once: the rules only see scalars."""
    starts = tuple(jnp.asarray(start) for *_, start in problems)

    def body(carry, _):
        params, state = carry
        gradients = tuple(g(p) for (_, g, *_), p in zip(problems, params, strict=True))
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, nag_jax.eval_params(params, state))

    init = (starts, optimizer.init(starts))
    ys, xs = jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[1])(init)
    return [np.asarray(y) for y in ys], [np.asarray(x) for x in xs]


def accelerated(rule, learning_rate=1.0):
    return optax.chain(optax.sgd(learning_rate), nag_jax.accelerate(rule))


# Nothing but gradient descent, with an evaluated iterate.
DESCENT = rules.constant(rules.Coefficients(beta=0.0, kappa=0.0))


@functools.cache
def iterates(rule, problems, steps):
    return run(accelerated(rule), problems, steps)[1]


def worst_gap(rule, bound, problems=CONVEX, steps=STEPS, floor=0.0):
    """max over problems and k of (f(x_k) - f*) / bound(k, R^2, f_0)."""
    worst = 0.0
    for (value, _, solution, start), trajectory in zip(
        problems, iterates(rule, problems, steps), strict=True
    ):
        r2 = np.sum((start - solution) ** 2)
        for k, x in enumerate(trajectory, 1):
            limit = bound(k, r2, value(start))
            if limit > floor:
                worst = max(worst, value(x) / limit)
    return worst


T = reference.t_sequence(STEPS)
FISTA_BOUNDS = {
    "t_k": lambda k, r2, _: r2 / (2 * T[k - 1] ** 2),
    "k squared": lambda k, r2, _: 2 * r2 / (k + 1) ** 2,
}


@pytest.mark.parametrize("name", FISTA_BOUNDS)
def test_fista(name):
    assert 0.8 < worst_gap(rules.fista(), FISTA_BOUNDS[name]) <= SLACK
    assert worst_gap(DESCENT, FISTA_BOUNDS[name]) > 2


def test_simple_momentum_is_tight():
    bound = lambda k, r2, _: 2 * r2 / (k * k + 5 * k + 6)
    assert 0.99 < worst_gap(rules.chambolle_dossal(2.0), bound) <= SLACK
    assert worst_gap(rules.chambolle_dossal(4.0), bound) > 1.1
    assert worst_gap(DESCENT, bound) > 2


@pytest.mark.parametrize("a", [3.0, 10.0])
def test_chambolle_dossal(a):
    bound = lambda k, r2, _: a**2 * r2 / (2 * (k + a - 1) ** 2)
    steps = 40 if a < 10 else 300
    problems = CONVEX if a < 10 else (*map(huber, (0.003, 0.001)), tridiagonal(150))
    assert 0.1 < worst_gap(rules.chambolle_dossal(a), bound, problems, steps) <= SLACK
    assert worst_gap(DESCENT, bound, problems, steps) > 1.1


@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_strongly_convex(q):
    bound = lambda k, r2, f0: (1 - q**0.5) ** k * (f0 + q / 2 * r2)
    check = lambda rule: worst_gap(rule, bound, strong(q), 600, floor=1e-13)
    assert 0.1 < check(rules.strongly_convex(q)) <= SLACK
    assert check(DESCENT) > 2


@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_triple_momentum(q):
    bound = lambda k, r2, _: (1 - q**0.5) ** (2 * k) * r2 / (2 * q)
    check = lambda rule: worst_gap(rule, bound, strong(q), 600, floor=1e-13)
    assert check(rules.tmm(q)) <= SLACK
    assert check(DESCENT) > 10
    assert check(rules.fista()) > 10


@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_item(q):
    a = reference.item_sequence(q, 150)

    def worst(rule):
        ((_, _, solution, start),) = strong(q)
        (zs,) = iterates(rule, strong(q), 150)
        limit = np.sum((start - solution) ** 2) / (1 + q * np.array(a[1:151]))
        return np.max(np.where(limit > 1e-13, np.sum((zs - solution) ** 2, axis=1) / limit, 0.0))

    assert 0.1 < worst(rules.item(q)) <= SLACK
    assert worst(rules.strongly_convex(q)) > 1.1
    assert worst(DESCENT) > 2


@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_sc_ogm(q):
    gamma = ((8 / q + 1) ** 0.5 + 3) / (2 / q - 2)
    bound = lambda k, r2, _: r2 / 2 * (1 + gamma) ** -k
    check = lambda rule: worst_gap(rule, bound, strong(q), 600, floor=1e-13)
    assert check(rules.sc_ogm(q)) <= SLACK
    assert check(DESCENT) > 2


@pytest.mark.parametrize("robustness", [0.0, 0.3, 0.7])
def test_robust_momentum_contracts_at_its_rate(robustness):
    """Its spectral radius on every curvature in [mu, L] is at most rho, and above tmm's."""
    q = 0.01
    rho = robustness * (1 - q) + (1 - robustness) * (1 - q**0.5)
    c = rules.robust_momentum(q, robustness).step(())[1]
    radius = lambda h: np.max(np.abs(np.linalg.eigvals(np.array([
        [1 - (c.direct + c.lookahead * c.kappa) * h, c.lookahead * c.beta],
        [-c.kappa * h, c.beta]]))))  # fmt: skip
    radii = [radius(h) for h in np.linspace(q, 1, 200)]
    assert max(radii) <= rho + 1e-6
    assert max(radii) > 0.97 * rho
    assert radius(2.5) > rho


def test_ogm_is_twice_as_good_as_fista_at_any_time():
    bound = lambda k, r2, _: r2 / (4 * T[k - 1] ** 2)
    assert 0.8 < worst_gap(rules.ogm(), bound) <= SLACK
    assert worst_gap(rules.fista(), bound) > 1.5


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_ogm_with_a_horizon_is_tight(horizon):
    t = reference.t_sequence(horizon - 1)
    last = (1 + (1 + 8 * t[-1] ** 2) ** 0.5) / 2
    problems = (*CONVEX, huber(1 / last**2))
    bound = lambda k, r2, _: r2 / (2 * last**2) if k == horizon else np.inf
    check = lambda rule: worst_gap(rule, bound, problems, horizon)
    assert 0.999 < check(rules.ogm(horizon)) <= SLACK
    assert check(DESCENT if horizon == 1 else rules.ogm()) > 1.01


@pytest.mark.parametrize("horizon", [1, 5, 40])
def test_ogm_g_makes_the_gradient_small(horizon):
    theta = reference.ogm_g_thetas(horizon)[0]
    # Between gradient steps that just do not leave the linear part, and just leave it at once.
    problems = (*CONVEX, *map(huber, (0.5 / horizon, 1 / (horizon + 1), 1 / (2 * horizon + 1))))

    def worst(rule):
        worst = 0.0
        ys, _ = run(accelerated(rule), problems, horizon)
        for (value, gradient, _, start), trajectory in zip(problems, ys, strict=True):
            limit = 2 * value(start) / theta**2
            worst = max(worst, float(np.sum(np.square(gradient(trajectory[-1]))) / limit))
        return worst

    assert worst(rules.ogm_g(horizon)) <= SLACK
    if horizon > 2:  # before that gradient descent is as good on these
        assert worst(DESCENT) > 1.1


def random_rates(seed, steps=STEPS):
    """Learning rates up to 1/L that jump by up to a factor of 20."""
    table = jnp.asarray(np.exp(-3 * np.random.default_rng(seed).random(steps + 2)))
    return table, lambda step: table[step]


def test_estimate_sequence_keeps_its_certificate_where_the_learning_rate_grows():
    table, rate = random_rates(0)
    t = [1.0]
    for k in range(STEPS):
        t.append((1 + (1 + 4 * t[-1] ** 2 * float(table[k] / table[k + 1])) ** 0.5) / 2)

    def worst(rule, certificate):
        worst = 0.0
        _, xs = run(accelerated(rule, rate), CONVEX)
        for (value, _, solution, start), trajectory in zip(CONVEX, xs, strict=True):
            r2 = np.sum((start - solution) ** 2)
            ratios = [value(x) / (r2 * certificate[k]) for k, x in enumerate(trajectory)]
            worst = max(worst, *ratios)
        return worst

    corrected = [1 / (2 * float(table[k]) * t[k] ** 2) for k in range(STEPS)]
    plain = [1 / (2 * float(table[k]) * T[k] ** 2) for k in range(STEPS)]
    assert 0.5 < worst(rules.estimate_sequence(rate), corrected) <= SLACK
    assert worst(rules.fista(), plain) > 1.5


@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_estimate_sequence_with_strong_convexity(q):
    table, rate = random_rates(1, 400)
    ((value, gradient, solution, start),) = strong(q)
    # The scheme's own bound: R^2/(2 lr_0) times the product of 1 - alpha_i.
    *_, alphas = reference.estimate_sequence(
        gradient, start, lambda k: float(table[k]), lambda _: q, 400
    )
    r2 = np.sum((start - solution) ** 2)
    products = np.concatenate([[1.0], np.cumprod(1 - alphas[1:])])
    bound = r2 / (2 * float(table[0])) * products

    def worst(rule):
        _, (xs,) = run(accelerated(rule, rate), strong(q), 400)
        return max(value(x) / b for x, b in zip(xs, bound, strict=False) if b > 1e-13)

    assert worst(rules.estimate_sequence(rate, q)) <= SLACK
    assert worst(DESCENT) > 1.1
    # A convexity above the true one loses the rate.
    steps = lambda mu: run(accelerated(rules.estimate_sequence(1.0, mu)), strong(q), 300)[1][0]
    assert value(steps(q)[-1]) < value(steps(min(30 * q, 0.9))[-1])


def test_agnes_converges_at_its_rate_where_nesterov_diverges():
    """Multiplicative noise g = (1 + sigma*xi) grad f, xi = +-1, sigma = 3: mean of 200 runs."""
    q, sigma, repeats, steps = 1e-2, 3.0, 200, 1500
    root, noise = q**0.5, 1 + sigma**2
    curvatures = jnp.logspace(-2, 0, 12)
    signs = jax.random.rademacher(jax.random.key(0), (steps, repeats, 1), float)

    def gap(rule, learning_rate):
        optimizer = accelerated(rule, learning_rate)
        start = jnp.ones((repeats, 12))

        def body(carry, sign):
            params, state = carry
            noisy = curvatures[None] * params * (1 + sigma * sign)
            updates, state = optimizer.update(noisy, state)
            return (optax.apply_updates(params, updates), state), None

        init = (start, optimizer.init(start))
        (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, signs))(init)
        x = nag_jax.eval_params(params, state)
        return float(jnp.mean(jnp.sum(curvatures[None] * x**2, axis=1) / 2))

    rho = (noise - root) / (noise + root)
    ratio = (1 - root) / (1 - root + sigma**2)
    bound = 2 * float(jnp.sum(curvatures) / 2) * (1 - root / noise) ** steps
    assert gap(rules.agnes(rho, ratio), 1 / noise) <= bound
    assert not gap(rules.strongly_convex(q), 1.0) <= 1e6
