"""Every rule is the method of its paper: 1e-12 in float64, with schedules where it allows them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import nag_jax
from nag_jax import rules, schedules

STEPS = 60
Q = 0.01
START = np.random.default_rng(0).standard_normal(8)
CURVATURES = np.logspace(-2, 0, 8)
ROTATION = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
HESSIAN = ROTATION * CURVATURES @ ROTATION.T


def gradient(y):
    """Of a quadratic with a quartic on top, so that nothing cancels by linearity."""
    return HESSIAN @ y + 0.01 * y**3


def wavy(step, xp=np):
    """Down and up again, with jumps: what a learning rate may do."""
    return 0.5 / (1 + 0.02 * step) * xp.where(step % 7 < 5, 1.0, 0.4)


def sine(step, xp=np):
    """A momentum that moves and is 0 for a while."""
    return 0.9 * xp.sin(step / 8.0) ** 2 * xp.where((step > 10) & (step < 13), 0.0, 1.0)


def ours(schedule):
    return lambda step: schedule(step, jnp)


def always(number):
    return lambda step: number


def after_lr(rule, learning_rate):
    return optax.chain(optax.scale_by_learning_rate(learning_rate), nag_jax.accelerate(rule))


def before_lr(rule, learning_rate):
    return optax.chain(nag_jax.accelerate(rule), optax.scale_by_learning_rate(learning_rate))


def trajectory(optimizer, start=START, gradient=gradient, steps=STEPS):
    """Query points and evaluated iterates of every step, jitted and scanned."""

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, nag_jax.eval_params(params, state))

    start = jnp.asarray(start)
    run = jax.jit(lambda start: jax.lax.scan(body, (start, optimizer.init(start)), length=steps)[1])
    ys, xs = run(start)
    return np.concatenate([start[None], ys]), np.concatenate([start[None], xs])


# name: (rule, reference, what else the reference takes); all for any schedule of learning rates
PLAIN = {
    "fista": (rules.fista(), reference.fista, {}),
    "chambolle_dossal": (rules.chambolle_dossal(4.0), reference.chambolle_dossal, dict(a=4.0)),
    "strongly_convex": (rules.strongly_convex(Q), reference.strongly_convex, dict(q=Q)),
    "ogm": (rules.ogm(), reference.ogm, {}),
    "ogm horizon": (rules.ogm(STEPS), reference.ogm, dict(horizon=STEPS)),
    "ogm_g": (rules.ogm_g(STEPS), reference.ogm_g, {}),
    "tmm": (rules.tmm(Q), reference.tmm, dict(q=Q)),
    "item": (rules.item(Q), reference.item, dict(q=Q)),
    "sc_ogm": (rules.sc_ogm(Q), reference.sc_ogm, dict(q=Q)),
    "robust": (
        rules.robust_momentum(Q, 0.3),
        reference.robust_momentum,
        dict(q=Q, robustness=0.3),
    ),
    "mass": (rules.mass(0.1, 4.0), reference.mass, dict(alpha=0.1, kappa=4.0)),
    "accsgd": (
        rules.accsgd(50.0, 5.0, 0.7),
        reference.accsgd,
        dict(kappa=50.0, xi=5.0, small_const=0.7),
    ),
}
rates = pytest.mark.parametrize("rate", [always(0.5), wavy], ids=["constant", "scheduled"])
momenta = pytest.mark.parametrize("momentum", [always(0.8), sine], ids=["constant", "scheduled"])


def jax_rate(rate):
    return ours(wavy) if rate is wavy else rate(0)


def jax_momentum(momentum):
    return ours(sine) if momentum is sine else momentum(0)


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(1.0, np.max(np.abs(theirs)))
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@rates
@pytest.mark.parametrize("name", PLAIN)
def test_rules_without_schedules(name, rate):
    rule, method, arguments = PLAIN[name]
    # The slow ones amplify rounding as they diverge; AccSGD's long step is 70 times this one.
    scale = {"accsgd": 0.1}.get(name, 1.0)
    scaled = lambda step: scale * rate(step)
    expected = method(gradient, START, scaled, steps=STEPS, **arguments)
    lr = (lambda step: scale * wavy(step, jnp)) if rate is wavy else scaled(0)
    actual = trajectory(after_lr(rule, lr))
    assert np.max(np.abs(expected[0])) < 100
    assert_same(actual, expected)


@pytest.mark.usefixtures("x64")
@rates
@pytest.mark.parametrize("convexity", [0.0, 0.01, "scheduled"])
def test_estimate_sequence(rate, convexity):
    mu = (lambda step: 0.01 * (1 + 0.5 * np.cos(step))) if convexity == "scheduled" else (
        always(convexity))  # fmt: skip
    jax_mu = (
        (lambda step: 0.01 * (1 + 0.5 * jnp.cos(step))) if convexity == "scheduled" else convexity
    )
    *expected, _ = reference.estimate_sequence(gradient, START, rate, mu, STEPS)
    rule = rules.estimate_sequence(jax_rate(rate), jax_mu)
    assert_same(trajectory(after_lr(rule, jax_rate(rate))), expected)


@pytest.mark.usefixtures("x64")
def test_estimate_sequence_is_fista_and_tends_to_the_constant_momentum():
    fista = trajectory(after_lr(rules.fista(), 0.5))
    assert_same(trajectory(after_lr(rules.estimate_sequence(0.5), 0.5)), fista)
    rule = rules.estimate_sequence(0.5, 2 * Q)
    carry = rule.init()
    for _ in range(300):
        carry, c = rule.step(carry)
    assert c.beta == pytest.approx(rules.strongly_convex(Q).step(())[1].beta, abs=1e-12)


@pytest.mark.usefixtures("x64")
def test_estimate_sequence_survives_learning_rates_of_zero():
    rate = lambda step: jnp.where((step < 3) | ((step > 20) & (step < 24)), 0.0, 0.5)
    ys, xs = trajectory(after_lr(rules.estimate_sequence(rate), rate))
    np.testing.assert_array_equal(ys[:4], np.broadcast_to(START, (4, 8)))
    assert np.all(np.isfinite(ys))
    # From step 24 on it is FISTA started at the params of then, whose offset is 0.
    expected = reference.fista(gradient, ys[24], always(0.5), STEPS - 24)
    np.testing.assert_allclose(ys[24], xs[24], rtol=1e-12)
    assert_same((ys[24:], xs[24:]), expected)


@pytest.mark.usefixtures("x64")
@rates
@momenta
def test_rules_with_a_momentum(rate, momentum):
    lr, mu = jax_rate(rate), jax_momentum(momentum)
    nu, jax_nu = always(0.7), 0.7
    # Heavy ball with the learning rate in front is Polyak's: (x - x_) carries old rates.
    assert_same(
        trajectory(after_lr(rules.heavy_ball(mu), lr)),
        reference.heavy_ball(gradient, START, rate, momentum, STEPS),
    )
    assert_same(
        trajectory(before_lr(rules.qhm(mu, jax_nu), lr)),
        reference.qhm(gradient, START, rate, momentum, nu, STEPS),
    )
    assert_same(
        trajectory(after_lr(rules.agnes(mu, 0.3), lr)),
        reference.agnes(gradient, START, rate, momentum, always(0.3), STEPS),
    )
    weights = sine if momentum is sine else nu
    assert_same(
        trajectory(before_lr(rules.qhm(mu, ours(sine) if weights is sine else jax_nu), lr)),
        reference.qhm(gradient, START, rate, momentum, weights, STEPS),
    )


@pytest.mark.usefixtures("x64")
@rates
@pytest.mark.parametrize("momentum", [0.0, 0.97])
@pytest.mark.parametrize("interpolation", [0.0, 0.8])
def test_averaging_rules(rate, momentum, interpolation):
    base = lambda t, y: -rate(t) * gradient(y)
    assert_same(
        trajectory(after_lr(rules.gpa(momentum, interpolation), jax_rate(rate))),
        reference.primal_averaging(base, START, always(1 - momentum), interpolation, STEPS),
    )


def window(step, xp=np):
    """A look-ahead that follows ``wavy``, whose largest value is 0.5, from step 8 to 39."""
    inside = (step >= 8) & (step < 40)
    return xp.where(inside, 0.6 * wavy(step, xp) / 0.5, 0.0)


LOOKAHEADS = {"constant": (0.6, always(0.6)), "sine": (ours(sine), sine)} | {
    "window": (schedules.follow_learning_rate(0.6, ours(wavy), start=8, end=40), window),
}


@pytest.mark.usefixtures("x64")
@rates
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("name", LOOKAHEADS)
def test_ema_nesterov(rate, decay, name):
    lookahead, expected = LOOKAHEADS[name]
    base = lambda t, y: -rate(t) * gradient(y)
    assert_same(
        trajectory(after_lr(rules.ema_nesterov(decay, lookahead), jax_rate(rate))),
        reference.ema_nesterov(base, START, decay, expected, STEPS),
    )


BASES = {
    "sgd": lambda lr: optax.sgd(lr, 0.9),
    "adamw": lambda lr: optax.adamw(lr, weight_decay=0.01),
    "muon": lambda lr: optax.contrib.muon(lr, weight_decay=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BASES)
def test_ema_nesterov_around_another_optimizer(name, dtype, request):
    """The recursion of the paper, with the optimizer itself as its black box."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    ahead = schedules.follow_learning_rate(0.6, rate, start=8, end=40)
    base, start = BASES[name](rate), START.reshape(2, 4).astype(dtype)
    of = lambda y: jnp.asarray(gradient(y.ravel()).reshape(2, 4), dtype)
    state = base.init(jnp.asarray(start))

    def step(t, y):
        nonlocal state
        y = jnp.asarray(y, dtype)
        updates, state = jax.jit(base.update)(of(y), state, y)
        return np.asarray(updates)

    expected = reference.ema_nesterov(step, start, 0.99, lambda t: float(ahead(t)), STEPS)
    optimizer = optax.chain(base, nag_jax.accelerate(rules.ema_nesterov(0.99, ahead)))
    actual = trajectory(optimizer, start, lambda y: of(y))
    tolerance = 1e-12 if dtype == "float64" else 1e-4  # Muon amplifies rounding
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    assert np.max(np.abs(expected[0] - expected[1])) > 1e-3


@pytest.mark.usefixtures("x64")
@rates
@pytest.mark.parametrize("period", [2, 10, "scheduled"])
def test_srsgd(rate, period):
    periods = (lambda step: 5 + step // 10) if period == "scheduled" else always(period)
    actual = trajectory(after_lr(rules.srsgd(periods), jax_rate(rate)))
    assert_same(actual, reference.srsgd(gradient, START, rate, periods, STEPS))
    if period == 10:
        assert_same(trajectory(after_lr(rules.srsgd(10), jax_rate(rate))), actual)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"),
    [(1.0, 0.6, 0.6), (1.0, 0.6, 0.0), (1.0, 0.0, 0.0), (1.3, 0.7, 0.2), (1.5, 0.4, 0.9)],
)
def test_lessard(alpha, beta, gamma):
    step = lambda t: alpha * wavy(t)
    expected = reference.xi_form(gradient, START, step, STEPS, beta, gamma, delta=0.0)
    actual = trajectory(after_lr(rules.lessard(alpha, beta, gamma), ours(wavy)))
    assert_same(actual, expected)


@pytest.mark.usefixtures("x64")
def test_relations_between_the_rules():
    """What methods have in common, in the words of their docstrings."""
    points = lambda rule, lr=0.5: trajectory(after_lr(rule, lr))
    assert_same(points(rules.lessard(1.0, 0.8, 0.8)), points(rules.nesterov(0.8)))
    assert_same(points(rules.qhm(0.8, 0.8), 2.5)[0], points(rules.nesterov(0.8))[0])
    assert_same(points(rules.gpa(0.8, 0.8), 2.5), points(rules.nesterov(0.8)))
    assert_same(points(rules.agnes(0.8, 1.0)), points(rules.nesterov(0.8)))
    assert_same(points(rules.ema_nesterov(0.0, ours(sine))), points(rules.nesterov(ours(sine))))
    rho = 0.9 + 0.1 * 0.6
    assert_same(points(rules.ema_nesterov(0.9, 0.6)), points(rules.agnes(rho, 0.1 * 0.6 / rho)))
    assert_same(points(rules.robust_momentum(Q, 0.0))[0], points(rules.tmm(Q))[0])
    assert_same(points(rules.lessard(1.0, 0.0, 0.0))[0], _descent(0.5))
    item, tmm = rules.item(Q), rules.tmm(Q).step(())[1]
    carry = item.init()
    for _ in range(300):
        carry, c = item.step(carry)
    np.testing.assert_allclose(c, tmm, rtol=1e-10)


def _descent(learning_rate):
    ys = [START]
    for _ in range(STEPS):
        ys.append(ys[-1] - learning_rate * gradient(ys[-1]))
    return np.stack(ys)


def test_item_outlives_the_overflow_of_its_sequence():
    """In float32 A_k itself is infinite after about 44/sqrt(q) steps."""
    q, rule = 0.01, rules.item(0.01)
    with np.errstate(over="ignore"):
        a = np.float32(0)
        for _ in range(1000):
            root = np.sqrt((1 + a) * (1 + np.float32(q) * a))
            a = ((1 + np.float32(q)) * a + 2 * (1 + root)) / np.float32((1 - q) ** 2)
    assert not np.isfinite(a)
    body = lambda carry, _: rule.step(carry)
    _, coefficients = jax.lax.scan(body, rule.init(), length=1000)
    last = [float(np.reshape(c, -1)[-1]) for c in coefficients]
    assert np.all(np.isfinite(np.concatenate([np.reshape(c, -1) for c in coefficients])))
    np.testing.assert_allclose(last, rules.tmm(q).step(())[1], rtol=1e-5)


CONSTANT = {
    "strongly_convex": rules.strongly_convex(Q),
    "tmm": rules.tmm(Q),
    "sc_ogm": rules.sc_ogm(Q),
    "lessard": rules.lessard(1.0, 0.5, 0.3),
    "robust_momentum": rules.robust_momentum(Q),
    "gpa": rules.gpa(),
    "mass": rules.mass(),
    "accsgd": rules.accsgd(),
    "heavy_ball": rules.heavy_ball(0.9),
    "qhm": rules.qhm(),
    "agnes": rules.agnes(),
    "ema_nesterov": rules.ema_nesterov(),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_rules_are_python_floats(name):
    rule = CONSTANT[name]
    assert all(type(c) is float for c in rule.step(rule.init())[1])
    numpy_q = rules.strongly_convex(np.float32(0.25)).step(())[1]
    assert all(type(c) is float for c in numpy_q)


BAD = {
    "chambolle_dossal": (lambda: rules.chambolle_dossal(1.5), r"a must be in \[2, inf\), got 1.5"),
    "strongly_convex": (lambda: rules.strongly_convex(0), r"q = mu/L must be in \(0, 1\], got 0;"),
    "tmm": (lambda: rules.tmm(1.5), r"q = mu/L must be in \(0, 1\], got 1.5"),
    "tmm text": (lambda: rules.tmm("0.1"), r"q = mu/L must be a number in \(0, 1\], got '0.1'"),
    "item": (lambda: rules.item(1.0), r"q = mu/L must be in \(0, 1\), got 1; .*fista"),
    "sc_ogm": (lambda: rules.sc_ogm(float("nan")), r"q = mu/L must be in \(0, 1\), got nan"),
    "ogm": (lambda: rules.ogm(0), r"horizon must be an int of at least 1, got 0"),
    "ogm half": (lambda: rules.ogm(2.5), r"horizon must be an int of at least 1, got 2.5"),
    "ogm_g": (lambda: rules.ogm_g(0), r"horizon must be an int of at least 1, got 0"),
    "ogm_g text": (lambda: rules.ogm_g("9"), r"horizon must be an int of at least 1, got '9'"),
    "lessard beta": (lambda: rules.lessard(1.0, 1.0, 0.0), r"beta must be in \[0, 1\), got 1"),
    "lessard gamma": (lambda: rules.lessard(1.0, 0.0, 0.5), r"beta must be above 0 .* gamma=0.5"),
    "robust": (lambda: rules.robust_momentum(0.1, 1.5), r"robustness must be in \[0, 1\], got 1.5"),
    "estimate lr": (lambda: rules.estimate_sequence(0.0), r"learning_rate must be in \(0, inf\)"),
    "estimate mu": (lambda: rules.estimate_sequence(0.1, -1.0), r"strong_convexity must be in \["),
    "heavy_ball": (lambda: rules.heavy_ball(1.0), r"momentum must be in \[0, 1\), got 1"),
    "qhm": (lambda: rules.qhm(0.9, -0.1), r"nu must be in \[0, inf\), got -0.1"),
    "gpa": (lambda: rules.gpa(0.9, 1.0), r"interpolation must be in \[0, 1\), got 1"),
    "ema decay": (lambda: rules.ema_nesterov(1.0), r"decay must be in \[0, 1\), got 1$"),
    "ema lookahead": (
        lambda: rules.ema_nesterov(0.99, -0.1),
        r"lookahead must be in \[0, 1\), got -0.1; from 1",
    ),
    "ema lookahead of 1": (lambda: rules.ema_nesterov(0.99, 1.0), "would grow without bound"),
    "agnes": (lambda: rules.agnes(0.9, -1.0), r"ratio must be in \[0, inf\), got -1"),
    "mass": (lambda: rules.mass(0.0), r"alpha must be in \(0, 1\], got 0$"),
    "accsgd": (lambda: rules.accsgd(10.0, xi=100.0), r"xi must be in \(0, 20.4\d*\), got 100"),
    "accsgd const": (lambda: rules.accsgd(small_const=0.0), r"small_const must be in \(0, 1\]"),
    "srsgd": (lambda: rules.srsgd(1), r"period must be in \[2, inf\), got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_stability_limit_is_where_a_quadratic_starts_to_diverge():
    """The spectral radius of one step is below 1 just under the limit and above it just over."""
    random = np.random.default_rng(0)
    for _ in range(200):
        b, kappa = random.uniform(0, 0.99), random.uniform(0.0, 2.5)
        direct, lookahead = random.uniform(0.3, 1.0), random.uniform(0.3, 1.0)
        limit = rules.stability_limit(b, kappa, direct, lookahead)

        def radius(h, b=b, kappa=kappa, d=direct, a=lookahead):
            step = [[1 - d * h - a * kappa * h, a * b], [-kappa * h, b]]
            return np.max(np.abs(np.linalg.eigvals(np.array(step))))

        assert radius(limit * (1 - 1e-4)) < 1 < radius(limit * (1 + 1e-4))
