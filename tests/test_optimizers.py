"""nag is exact Nesterov under schedules, says what is wrong, converts from optax and hands over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import nag_jax

HESSIAN = np.diag(np.logspace(-2, 0, 6))
START = np.linspace(-1.0, 2.0, 6)
STEPS = 60


def gradient(y):
    return HESSIAN @ y


def jumping_rate(step):
    """0 at first, then a decay with a third of the rate at every seventh step."""
    step = jnp.asarray(step, float)
    rate = 0.9 / (1 + 0.03 * step) * jnp.where(step % 7 == 0, 0.3, 1.0)
    return jnp.where(step < 2, 0.0, rate)


def stepped_momentum(step):
    """The 2013 schedule, sped up, with two steps at 0 in it."""
    step = jnp.asarray(step, float)
    mu = jnp.minimum(1 - 2.0 ** (-1 - jnp.log2(jnp.floor(step / 5) + 1)), 0.99)
    return jnp.where((step == 11) | (step == 12), 0.0, mu)


def run(optimizer, steps=STEPS, start=START, gradient=gradient):
    """The params and the evaluation iterates of all steps, the start included."""
    params = jnp.asarray(start)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, nag_jax.eval_params(params, state)

    ys, xs = [params], [params]
    for _ in range(steps):
        params, state, x = step(params, state)
        ys.append(params)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.9, stepped_momentum], ids=["constant", "scheduled"])
@pytest.mark.parametrize("rate", [0.8, jumping_rate], ids=["constant", "scheduled"])
class TestReference:
    def both(self, rate, momentum):
        as_function = lambda value: value if callable(value) else lambda step: value
        return gradient, START, as_function(rate), as_function(momentum), STEPS

    def test_sutskever_is_exact_nesterov(self, rate, momentum):
        expected = reference.sutskever(*self.both(rate, momentum))
        actual = run(nag_jax.nag(rate, momentum, convention="sutskever"))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)

    def test_optax_convention_and_its_evaluation_iterate(self, rate, momentum):
        expected = reference.torch_sgd(*self.both(rate, momentum))
        actual = run(nag_jax.nag(rate, momentum))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)

    def test_coupled_decay_is_part_of_the_gradient(self, rate, momentum):
        _, start, rate_at, momentum_at, steps = self.both(rate, momentum)
        decayed = lambda y: gradient(y) + 0.05 * y
        expected = reference.sutskever(decayed, start, rate_at, momentum_at, steps)
        actual = run(nag_jax.nag(rate, momentum, convention="sutskever", weight_decay=0.05))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)

    def test_decoupled_decay_moves_both_points(self, rate, momentum):
        decay = lambda step: 0.05 / (1 + 0.1 * jnp.asarray(step, float))
        expected = reference.decoupled_sutskever(*self.both(rate, momentum), decay)
        options = {"convention": "sutskever", "weight_decay": decay, "decay": "decoupled"}
        actual = run(nag_jax.nag(rate, momentum, **options))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)

    def test_decay_schedules_in_the_optax_convention(self, rate, momentum):
        decay = lambda step: 0.05 / (1 + 0.1 * jnp.asarray(step, float))
        function, _, rate_at, momentum_at, steps = self.both(rate, momentum)
        y, buffer, expected = START, 0.0, {}
        for kind in ("coupled", "decoupled"):
            y, buffer, expected[kind] = START, 0.0, [START]
            for t in range(steps):
                shrink = decay(t) * y
                g = function(y) + (shrink if kind == "coupled" else 0.0)
                buffer = momentum_at(t) * buffer + g
                direction = g + momentum_at(t) * buffer
                y = y - rate_at(t) * (direction + (shrink if kind == "decoupled" else 0.0))
                expected[kind].append(y)
            actual, _ = run(nag_jax.nag(rate, momentum, weight_decay=decay, decay=kind))
            np.testing.assert_allclose(actual, np.stack(expected[kind]), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_optax_sgd_is_not_nesterov_under_a_schedule():
    momentum = lambda step: 0.9
    exact, _ = reference.sutskever(gradient, START, jumping_rate, momentum, STEPS)
    params = jnp.asarray(START)
    sgd = optax.sgd(jumping_rate, 0.9, nesterov=True)
    state = sgd.init(params)
    for _ in range(STEPS):
        updates, state = sgd.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert np.max(np.abs(params - exact[-1])) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("convention", ["optax", "sutskever"])
@pytest.mark.parametrize(("decay", "factor"), [("coupled", 10.0), ("decoupled", 1.0)])
def test_shrinkage_per_step(convention, decay, factor):
    options = {"convention": convention, "weight_decay": 1e-3, "decay": decay}
    optimizer = nag_jax.nag(0.1, 0.9, **options)
    ys, _ = run(optimizer, 3000, gradient=jnp.zeros_like)
    shrink = 1 - (ys[-1] / ys[-1001]) ** 1e-3
    np.testing.assert_allclose(shrink, factor * 1e-4, rtol=0.02)


@pytest.mark.parametrize("convention", ["optax", "sutskever"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_weight_decay_mask_leaves_the_rest_alone(convention, decay):
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(2)}
    mask = {"kernel": True, "bias": False}
    for given in (mask, lambda params: jax.tree.map(lambda p: p.size == 3, params)):
        optimizer = nag_jax.nag(
            0.1, convention=convention, weight_decay=0.5, weight_decay_mask=given, decay=decay
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        assert np.all(updates["kernel"] < 0)
        assert np.all(updates["bias"] == 0)


BAD_ARGUMENTS = {
    "dtype": (
        dict(learning_rate=0.1, accumulator_dtype="nonsense"),
        "must be a floating or complex dtype",
    ),
    "momentum": (dict(learning_rate=0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1;"),
    "negative": (dict(learning_rate=0.1, momentum=-0.1), r"momentum must be in \[0, 1\), got -0.1"),
    "nan": (dict(learning_rate=0.1, momentum=float("nan")), r"momentum must be in .*got nan"),
    "rate": (dict(learning_rate=-0.1), r"learning_rate must be in \[0, inf\), got -0.1"),
    "text": (dict(learning_rate="0.1"), r"learning_rate must be a number .* got '0.1'"),
    "decay": (dict(learning_rate=0.1, weight_decay=-1.0), r"weight_decay must be in \[0, inf\)"),
    "kind": (dict(learning_rate=0.1, decay="l2"), r"decay must be one of 'coupled', 'decoupled'"),
    "convention": (
        dict(learning_rate=0.1, convention="keras"),
        r"convention must be one of 'optax', 'sutskever', got 'keras'",
    ),
    "accumulator": (
        dict(learning_rate=0.1, accumulator_dtype="int8"),
        r"accumulator_dtype must be a floating or complex dtype",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case):
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        nag_jax.nag(**arguments)
    with pytest.raises(ValueError, match=message):
        optax.inject_hyperparams(nag_jax.nag)(**arguments).init(jnp.ones(2))


def test_bfloat16_hyperparams_that_round_momentum_to_one_are_refused():
    params = jnp.ones(2, jnp.bfloat16)
    arguments = {"learning_rate": 0.1, "momentum": 0.999, "accumulator_dtype": "float32"}
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(nag_jax.nag)(**arguments).init(params)
    inject = optax.inject_hyperparams(nag_jax.nag, hyperparam_dtype=jnp.float32)
    assert inject(**arguments).init(params).hyperparams["momentum"] == np.float32(0.999)


SWITCHES = {
    "plain": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, [True, False]),
    "multisteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "chained": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
}


@pytest.mark.parametrize("wrapper", SWITCHES)
@pytest.mark.parametrize("rate", [0.5, jumping_rate], ids=["constant", "scheduled"])
def test_from_optax_goes_on_with_the_same_numbers(rate, wrapper):
    wrap = SWITCHES[wrapper]
    sgd = wrap(optax.sgd(rate, 0.9, nesterov=True))
    nag = wrap(nag_jax.nag(rate, 0.9))

    def go(optimizer, params, state, steps):
        @jax.jit
        def step(params, state):
            gradients = [jnp.asarray(HESSIAN[:2, :2]) @ params[0], params[1]]
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return params, state

    start = [jnp.ones(2), -jnp.ones(3)]
    half, state = go(sgd, start, sgd.init(start), 51)
    expected, _ = go(sgd, half, state, 51)
    converted = nag_jax.from_optax(state)
    assert jax.tree.structure(converted) == jax.tree.structure(nag.init(start))
    actual, _ = go(nag, half, converted, 51)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7)
    restarted, _ = go(nag, half, nag.init(half), 51)
    assert not np.array_equal(restarted[0], expected[0])


def test_from_optax_keeps_the_step_and_can_place_the_evaluation_iterate():
    params = jnp.ones(3)
    sgd, nag = optax.sgd(jumping_rate, 0.9, nesterov=True), nag_jax.nag(jumping_rate, 0.9)
    state, expected = sgd.init(params), nag.init(params)
    for _ in range(5):
        _, state = sgd.update(params, state)
        _, expected = nag.update(params, expected)
    readout = 0.9 * float(jumping_rate(4))
    converted = nag_jax.from_optax(state, readout=readout)
    assert int(converted.carry) == 5
    at = lambda state: np.asarray(nag_jax.eval_params(params, state))
    np.testing.assert_allclose(at(converted), at(expected), rtol=1e-6)
    assert np.array_equal(at(nag_jax.from_optax(state)), params)
    assert int(nag_jax.from_optax(state, step=7).carry) == 7


def test_from_optax_can_be_donated():
    sgd, nag = optax.sgd(jumping_rate, 0.9, nesterov=True), nag_jax.nag(jumping_rate, 0.9)
    params = jnp.ones(3)
    state = nag_jax.from_optax(sgd.update(params, sgd.init(params))[1])
    jax.jit(nag.update, donate_argnums=1)(params, state)


def test_from_optax_takes_the_step_of_sgd_itself():
    sgd = optax.MultiSteps(optax.sgd(jumping_rate, 0.9, nesterov=True), 4)
    chain = optax.chain(optax.scale_by_schedule(lambda k: 1.0), sgd.gradient_transformation())
    params, update = jnp.ones(3), jax.jit(chain.update)
    state = chain.init(params)
    for _ in range(8):
        _, state = update(params, state, params)
    (converted,) = [
        s
        for s in jax.tree.leaves(
            nag_jax.from_optax(state), is_leaf=lambda s: isinstance(s, nag_jax.AccelerateState)
        )
        if isinstance(s, nag_jax.AccelerateState)
    ]
    assert int(converted.carry) == 2


def test_from_optax_of_a_trace_within_a_chain():
    """It becomes accelerate(rules.trace(...)) at that place."""
    links = optax.clip(9.0), optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(0.1)
    kernel = nag_jax.accelerate(nag_jax.rules.trace(0.9, 0.1))
    theirs, ours = optax.chain(*links), optax.chain(links[0], kernel, links[2])
    params = jnp.ones(3)
    _, state = theirs.update(params, theirs.init(params))
    converted = nag_jax.from_optax(state)
    assert jax.tree.structure(converted) == jax.tree.structure(ours.init(params))
    updates, after = ours.update(params, converted)
    np.testing.assert_array_equal(updates, theirs.update(params, state)[0])
    x = nag_jax.eval_params(params + updates, after)
    np.testing.assert_allclose(x, params - 0.1 * params, rtol=1e-6)


def test_from_optax_refuses_a_state_without_momentum():
    with pytest.raises(ValueError, match=r"holds no optax\.TraceState"):
        nag_jax.from_optax(optax.sgd(0.1).init(jnp.ones(2)))


class TestNagThenSgd:
    SWITCH = 200

    def displacement(self, optimizer):
        """Mean movement of the iterate per step around the switch, under gradient noise."""
        noise = np.random.default_rng(1).standard_normal((400, 6))
        params = jnp.asarray(START)
        state, xs = optimizer.init(params), []
        step = jax.jit(lambda p, s, n: optimizer.update(gradient(p) + n, s, p))
        for n in noise:
            updates, state = step(params, state, jnp.asarray(n, jnp.float32))
            params = optax.apply_updates(params, updates)
            xs.append(nag_jax.eval_params(params, state))
        drift = np.stack(xs)
        # Over 20 steps: correlated small steps and independent large ones move alike.
        moved = np.linalg.norm(drift[20:] - drift[:-20], axis=1)
        return moved[100:180].mean(), moved[220:360].mean()

    def test_effective_step_does_not_jump(self):
        optimizer = nag_jax.nag_then_sgd(0.01, 0.9, switch_step=self.SWITCH, transition_steps=20)
        before, after = self.displacement(optimizer)
        assert 0.6 < after / before < 1.6

    def test_momentum_cut_alone_jumps(self):
        momentum = lambda step: jnp.where(step < self.SWITCH, 0.9, 0.0)
        before, after = self.displacement(nag_jax.nag(0.01, momentum, convention="sutskever"))
        assert after / before < 0.25

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("transition", [0, 30])
    def test_is_plain_sgd_from_the_switch_on(self, transition):
        optimizer = nag_jax.nag_then_sgd(
            0.1, 0.9, switch_step=50, transition_steps=transition, sgd_learning_rate=0.7
        )
        ys, xs = run(optimizer, 80)
        np.testing.assert_array_equal(ys[50:], xs[50:])
        assert np.max(np.abs(ys[45 - transition] - xs[45 - transition])) > 1e-3
        params = ys[50]
        for y in ys[51:]:
            params = params - 0.7 * gradient(params)
            np.testing.assert_allclose(y, params, rtol=0, atol=1e-14)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("transition", [0, 30])
    def test_is_nag_with_the_same_effective_step_until_then(self, transition):
        left = lambda t: np.clip((50 - t) / max(transition, 1), 0.0, 1.0)
        momentum = lambda t: 0.9 * left(t)
        rate = lambda t: (0.7 + (1.0 - 0.7) * left(t)) * (1 - momentum(t))
        optimizer = nag_jax.nag_then_sgd(
            0.1, 0.9, switch_step=50, transition_steps=transition, sgd_learning_rate=0.7
        )
        expected = reference.sutskever(gradient, START, rate, momentum, 50)
        np.testing.assert_allclose(run(optimizer, 50), expected, rtol=0, atol=1e-12)

    def test_lengths_may_be_arrays(self):
        lengths = dict(switch_step=6, transition_steps=4)
        arrays = jax.tree.map(jnp.asarray, lengths)
        found = run(nag_jax.nag_then_sgd(0.1, 0.9, **arrays), 8)
        expected = run(nag_jax.nag_then_sgd(0.1, 0.9, **lengths), 8)
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"transition_steps must be in \[0, 11\), got 20"):
            nag_jax.nag_then_sgd(0.1, switch_step=10, transition_steps=20)
        with pytest.raises(ValueError, match="learning_rate must be a number, since"):
            nag_jax.nag_then_sgd(jumping_rate, switch_step=10)
