"""eval_params: through every wrapper, after every kind of link, and what it refuses."""

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import rules

PARAMS = {"a": {"w": jnp.ones(3), "b": jnp.ones(2)}, "c": jnp.ones(4)}
ALL_SHIFTED = {"a": {"w": 1.0, "b": 1.0}, "c": 1.0}
CURVATURE = jnp.array([1.0, 0.1, 0.01])
ZERO = jnp.zeros(3)


def loss(params):
    return jnp.sum(CURVATURE * (params - 1) ** 2) / 2


def run(optimizer, steps=20, start=ZERO):
    """The params and the state of each step."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(g, state, params, value=value, grad=g, value_fn=loss)
        return optax.apply_updates(params, updates), state

    points = [(start, optimizer.init(start))]
    for _ in range(steps):
        points.append(step(*points[-1]))
    return points[1:]


def after_one_step(optimizer, params=PARAMS):
    """The state after a step on a gradient of ones: x = y + 0.1 * 0.9, where not masked."""
    gradients = jax.tree.map(jnp.ones_like, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    return state


def assert_shifted(actual, where):
    for x, scale in zip(jax.tree.leaves(actual), jax.tree.leaves(where), strict=True):
        np.testing.assert_allclose(x, 1.0 + 0.09 * scale, rtol=1e-6)


WRAPPED = {
    "alone": (nag_jax.nag(0.1), ALL_SHIFTED),
    "chain": (optax.chain(optax.clip(2.0), optax.chain(nag_jax.nag(0.1))), ALL_SHIFTED),
    "masked": (
        optax.masked(nag_jax.nag(0.1), {"a": {"w": True, "b": False}, "c": True}),
        {"a": {"w": 1.0, "b": 0.0}, "c": 1.0},
    ),
    "masked by prefix": (
        optax.masked(nag_jax.nag(0.1), {"a": False, "c": True}),
        {"a": {"w": 0.0, "b": 0.0}, "c": 1.0},
    ),
    "multisteps": (optax.MultiSteps(nag_jax.nag(0.1), 1).gradient_transformation(), ALL_SHIFTED),
    "injected": (optax.inject_hyperparams(nag_jax.nag)(0.1), ALL_SHIFTED),
    "apply_if_finite": (optax.apply_if_finite(nag_jax.nag(0.1), 3), ALL_SHIFTED),
    "conditionally_mask": (
        optax.conditionally_mask(nag_jax.nag(0.1), lambda step: step < 1),
        ALL_SHIFTED,
    ),
    "partition": (
        optax.partition(
            {"fast": nag_jax.nag(0.1), "slow": nag_jax.nag(0.05), "adam": optax.adam(0.1)},
            {"a": {"w": "slow", "b": "adam"}, "c": "fast"},
        ),
        {"a": {"w": 0.5, "b": 0.0}, "c": 1.0},
    ),
    "masked in multisteps in injected": (
        optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.MultiSteps(
                    optax.masked(nag_jax.nag(learning_rate), {"a": True, "c": False}), 1
                ).gradient_transformation()
            )
        )(0.1),
        {"a": {"w": 1.0, "b": 1.0}, "c": 0.0},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_finds_the_state(wrapper):
    optimizer, where = WRAPPED[wrapper]
    assert_shifted(nag_jax.eval_params(PARAMS, after_one_step(optimizer)), where)
    assert_shifted(jax.jit(nag_jax.eval_params)(PARAMS, after_one_step(optimizer)), where)
    fresh = nag_jax.eval_params(PARAMS, optimizer.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, fresh, PARAMS)


def flax_model(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)

    return Model(nnx.Rngs(0))


def test_of_a_flax_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = flax_model(nnx)
    optimizer = nnx.Optimizer(model, nag_jax.nag(0.1), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    gradients = jax.tree.map(jnp.ones_like, before)
    optimizer.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    for holder in (optimizer.opt_state, optimizer):
        x = nag_jax.eval_params(params, holder)
        assert jax.tree.structure(x) == jax.tree.structure(params)
        expected = jax.tree.map(lambda p: p - 0.1, before)  # x' = y - lr*g
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), x, expected)
    nnx.update(model, x)
    with pytest.raises(ValueError, match=r"must be the state of an optimizer, got State; .*nnx"):
        nag_jax.eval_params(params, nnx.state(optimizer))


TAILS = {
    "scale": optax.scale(0.5),
    "clip": optax.clip(0.01),
    "clip_by_global_norm": optax.clip_by_global_norm(0.01),
    "scale_by_schedule": optax.scale_by_schedule(lambda step: 0.5),
    "add_noise": optax.add_noise(0.1, 0.5, 0),
    "zero_nans": optax.zero_nans(),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "identity": optax.identity(),  # leaves a state like that of scale
    "freeze": optax.masked(optax.set_to_zero(), True),
    "adam": optax.adam(0.1),
    "line search": optax.scale_by_backtracking_linesearch(10),
    "injected": optax.inject_hyperparams(optax.scale)(0.5),
    "multisteps": optax.MultiSteps(optax.scale(0.5), 2).gradient_transformation(),
    "nag": nag_jax.nag(0.1),
}
PLACES = {
    "chain": lambda nag, tail: optax.chain(nag, tail),
    "after another chain": lambda nag, tail: optax.chain(optax.chain(optax.clip(9.0), nag), tail),
    "two links later": lambda nag, tail: optax.chain(nag, nag_jax.stochastic_rounding(), tail),
    "inside MultiSteps": lambda nag, tail: optax.MultiSteps(
        optax.chain(nag, tail), 1
    ).gradient_transformation(),
    "after MultiSteps": lambda nag, tail: optax.chain(
        optax.MultiSteps(nag, 1).gradient_transformation(), tail
    ),
    "masked": lambda nag, tail: optax.masked(optax.chain(nag, tail), True),
    "partition": lambda nag, tail: optax.partition({"all": optax.chain(nag, tail)}, "all"),
    "injected": lambda nag, tail: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(nag_jax.nag(learning_rate), tail)
    )(0.1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tail", TAILS)
def test_what_may_change_the_updates_is_refused(tail, place):
    state = PLACES[place](nag_jax.nag(0.1), TAILS[tail]).init(ZERO)
    message = r"link after the accelerated optimizer, of state .*put that link before it"
    with pytest.raises(ValueError, match=message):
        nag_jax.eval_params(ZERO, state)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(nag_jax.eval_params, ZERO, state)


def test_the_state_of_the_link_is_named():
    state = optax.chain(nag_jax.nag(0.1), optax.adam(0.1)).init(ZERO)
    with pytest.raises(ValueError, match=r"of state tuple"):
        nag_jax.eval_params(ZERO, state)
    state = optax.chain(nag_jax.nag(0.1), optax.clip(0.1)).init(ZERO)
    with pytest.raises(ValueError, match=r"of state EmptyState"):
        nag_jax.eval_params(ZERO, state)


OPTIMIZERS = {
    "averaged": nag_jax.averaged(nag_jax.nag(0.1)),
    "nag_auto": nag_jax.nag_auto(evaluate="iterate"),
    "backtracking": nag_jax.backtracking(),
    "monotone_fista": optax.chain(optax.sgd(0.1), nag_jax.monotone_fista(loss)),
    "lookahead": nag_jax.lookahead(optax.adam(0.1)),
    "fista": nag_jax.fista(0.1),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "adamw, accelerated": optax.chain(optax.adamw(0.1), nag_jax.accelerate(rules.gpa())),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_refuses_a_tail_and_takes_a_head(name):
    params, state = run(optax.chain(optax.clip_by_global_norm(0.5), OPTIMIZERS[name]), 5)[-1]
    chex.assert_trees_all_equal(
        nag_jax.eval_params(params, state), nag_jax.eval_params(params, state[-1])
    )
    state = optax.chain(OPTIMIZERS[name], optax.scale(0.5)).init(ZERO)
    with pytest.raises(ValueError, match="link after the accelerated optimizer"):
        nag_jax.eval_params(ZERO, state)


AT_PARAMS = {
    "heavy_ball": optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.heavy_ball())),
    "qhm": nag_jax.accelerate(rules.qhm()),
    "ogm_g": optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.ogm_g(5))),
    "adanag": nag_jax.adanag(),
    "pogm": nag_jax.pogm(0.1, nag_jax.proximal.l1(0.1), horizon=5),
    "optista": nag_jax.optista(0.1, nag_jax.proximal.l1(0.1), horizon=5),
}


@pytest.mark.parametrize("name", AT_PARAMS)
def test_where_params_are_the_iterate_anything_may_follow(name):
    for tail in TAILS.values():
        if tail is not TAILS["nag"]:
            state = optax.chain(AT_PARAMS[name], tail).init(ZERO)
            assert nag_jax.eval_params(ZERO, state) is ZERO
    params, state = run(AT_PARAMS[name], 3)[-1]
    assert nag_jax.eval_params(params, state) is params
    state = optax.contrib.mechanize(AT_PARAMS[name]).init(ZERO)
    assert nag_jax.eval_params(ZERO, state) is ZERO


@pytest.mark.parametrize("name", ["scale", "clip", "clip_by_global_norm", "zero_nans", "identity"])
def test_the_same_link_may_stand_before_the_optimizer(name):
    params, state = run(optax.chain(TAILS[name], nag_jax.nag(0.1)))[-1]
    m, readout = state[1].m, state[1].readout
    np.testing.assert_allclose(nag_jax.eval_params(params, state), params + readout * m, rtol=1e-6)
    assert np.max(np.abs(readout * m)) > 1e-3


def test_of_a_flax_optimizer_with_a_tail():
    nnx = pytest.importorskip("flax.nnx")
    model = flax_model(nnx)
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, optax.chain(nag_jax.nag(0.1), optax.scale(1)), wrt=nnx.Param)
    for holder in (optimizer.opt_state, optimizer):
        with pytest.raises(ValueError, match="link after the accelerated optimizer"):
            nag_jax.eval_params(params, holder)


def test_the_state_of_the_accelerated_part_may_be_passed_by_itself():
    params, state = run(optax.chain(nag_jax.nag(0.1), optax.identity()))[-1]
    _, expected = run(nag_jax.nag(0.1))[-1]
    chex.assert_trees_all_equal(
        nag_jax.eval_params(params, state[0]), nag_jax.eval_params(params, expected)
    )


@pytest.mark.parametrize("convention", ["optax", "sutskever"])
def test_reduce_on_plateau_may_follow(convention):
    """As optax documents it. It scales the step from y to x, too."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=1, rtol=0.1)
    nag = nag_jax.nag(0.5, 0.8, convention=convention)
    chain = optax.chain(optax.chain(optax.clip(9.0), nag), plateau)
    before, scales = ZERO, []
    for params, state in run(chain):
        scale = float(state[1].scale)
        expected = before - scale * 0.5 * jax.grad(loss)(before)
        np.testing.assert_allclose(nag_jax.eval_params(params, state), expected, atol=1e-6)
        before = params
        scales.append(scale)
    assert len(set(scales)) > 3
    twice = optax.chain(nag, plateau, plateau)
    params, state = run(twice)[-1]
    both = state[1].scale * state[2].scale
    alone = nag_jax.eval_params(params, state[0]) - params
    x = nag_jax.eval_params(params, state)
    np.testing.assert_allclose(x, params + both * alone, atol=1e-6)
    masked = optax.chain(nag, optax.masked(plateau, True))
    with pytest.raises(ValueError, match="of state MaskedState"):
        nag_jax.eval_params(ZERO, masked.init(ZERO))
    averaged = optax.chain(nag_jax.averaged(nag), plateau)
    with pytest.raises(ValueError, match="of state ReduceLROnPlateauState"):
        nag_jax.eval_params(ZERO, averaged.init(ZERO))


def test_reduce_on_plateau_in_a_flax_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Dict(p=nnx.Param(jnp.ones(3)))
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    optimizer = nnx.Optimizer(model, optax.chain(nag_jax.nag(0.1, 0.9), plateau), wrt=nnx.Param)
    for _ in range(3):
        before = jnp.array(model.p[...])
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)), value=1.0)
    assert float(optimizer.opt_state[1].scale) == 0.25
    x = nag_jax.eval_params(nnx.state(model, nnx.Param), optimizer.opt_state)
    np.testing.assert_allclose(jax.tree.leaves(x)[0], before - 0.25 * 0.1, rtol=1e-6)


TRANSPARENT = {
    "stochastic_rounding": nag_jax.stochastic_rounding(),
    "masked stochastic_rounding": optax.masked(nag_jax.stochastic_rounding(), True),
    "chain": optax.chain(nag_jax.stochastic_rounding(), nag_jax.stochastic_rounding()),
    "snapshot": optax.snapshot("update", jnp.linalg.norm),
    "monitor": optax.monitor({"norm": jnp.linalg.norm}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_links_that_pass_updates_on_may_follow(name):
    params, state = run(optax.chain(nag_jax.nag(0.1), TRANSPARENT[name]))[-1]
    expected = nag_jax.eval_params(*run(nag_jax.nag(0.1))[-1])
    np.testing.assert_allclose(nag_jax.eval_params(params, state), expected, atol=1e-6)


class TestBeforeTheLearningRate:
    """rules.trace counts the learning rate in, which is the link after it."""

    trace = nag_jax.accelerate(rules.trace(0.9, 0.1))
    rate = optax.scale_by_learning_rate(0.1)

    @pytest.mark.parametrize("nested", [False, True])
    def test_the_learning_rate_may_follow(self, nested):
        kernel = optax.chain(optax.clip(9.0), self.trace) if nested else self.trace
        pairs = zip(run(optax.chain(kernel, self.rate)), run(nag_jax.nag(0.1, 0.9)), strict=True)
        for actual, expected in pairs:
            x = nag_jax.eval_params(*actual)
            np.testing.assert_allclose(x, nag_jax.eval_params(*expected), rtol=1e-6)

    def test_and_nothing_else(self):
        state = optax.chain(self.trace, self.rate, optax.clip(0.1)).init(ZERO)
        with pytest.raises(ValueError, match="link after the accelerated optimizer"):
            nag_jax.eval_params(ZERO, state)

    def test_the_type_of_the_state_is_kept(self):
        state = self.trace.init(ZERO)
        _, after = self.trace.update(ZERO, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert isinstance(after, nag_jax.AccelerateState)


def test_a_wrapper_around_the_chain_may_know_the_iterate():
    chain = optax.chain(nag_jax.nag(0.1), optax.clip(0.05))
    points = run(nag_jax.averaged(chain, power=0.0))
    mean = np.mean([params for params, _ in points], axis=0)
    np.testing.assert_allclose(nag_jax.eval_params(*points[-1]), mean, atol=1e-6)
    params, state = run(nag_jax.lookahead(chain, every=20))[-1]
    np.testing.assert_allclose(nag_jax.eval_params(params, state), params, atol=1e-6)
    outside = nag_jax.outer(optax.sgd(0.1), optax.chain(nag_jax.nag(0.7), optax.scale(2)), every=2)
    with pytest.raises(ValueError, match="link after the accelerated optimizer"):
        nag_jax.eval_params(ZERO, outside.init(ZERO))


def test_minimize_refuses_it_too():
    with pytest.raises(ValueError, match="link after the accelerated optimizer"):
        nag_jax.minimize(loss, ZERO, optax.chain(nag_jax.nag(0.1), optax.clip(0.1)))


UNKNOWN = {
    "MechanicState": optax.contrib.mechanize(nag_jax.nag(0.1)),
    "ConditionallyTransformState": optax.conditionally_transform(
        nag_jax.nag(0.1), lambda step: step < 1
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_wrappers_that_may_change_updates_are_refused(name):
    with pytest.raises(ValueError, match=rf"inside {name}, .* method iterate\(params\)"):
        nag_jax.eval_params(ZERO, UNKNOWN[name].init(ZERO))


def test_the_order_of_a_named_chain_is_not_known():
    named = optax.named_chain(("clip", optax.clip(1.0)), ("nag", nag_jax.nag(0.1)))
    params, state = run(named)[-1]
    with pytest.raises(ValueError, match=r"in a dict, as optax\.named_chain .* order"):
        nag_jax.eval_params(params, state)
    expected = nag_jax.eval_params(*run(optax.chain(optax.clip(1.0), nag_jax.nag(0.1)))[-1])
    chex.assert_trees_all_close(nag_jax.eval_params(params, state["nag"]), expected)
    alone = optax.named_chain(("nag", nag_jax.nag(0.1)), ("round", nag_jax.stochastic_rounding()))
    expected = nag_jax.eval_params(*run(nag_jax.nag(0.1))[-1])
    chex.assert_trees_all_close(nag_jax.eval_params(*run(alone)[-1]), expected, atol=1e-6)


class ScaledState(NamedTuple):
    inner: Any
    scale: float


class KnownScaledState(NamedTuple):
    inner: Any
    scale: float

    def iterate(self, params):
        x = nag_jax.eval_params(params, self.inner)
        return jax.tree.map(lambda p, x: p + self.scale * (x - p), params, x)


def scaled(inner, scale, kind):
    """A user's wrapper that changes the updates."""

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda u: scale * u, updates)
        return updates, kind(inner_state, state.scale)

    return optax.GradientTransformation(lambda p: kind(inner.init(p), scale), update)


def test_a_wrapper_of_ones_own_joins_with_a_method():
    points = run(scaled(nag_jax.nag(0.2), 0.5, KnownScaledState))
    for actual, expected in zip(points, run(nag_jax.nag(0.1)), strict=True):
        x = nag_jax.eval_params(*actual)
        np.testing.assert_allclose(x, nag_jax.eval_params(*expected), atol=1e-6)
    with pytest.raises(ValueError, match="give ScaledState a method iterate"):
        nag_jax.eval_params(*run(scaled(nag_jax.nag(0.2), 0.5, ScaledState))[-1])
    inside = optax.chain(optax.clip(2.0), scaled(nag_jax.nag(0.2), 0.5, KnownScaledState))
    masked = optax.MultiSteps(optax.masked(inside, {"a": True, "c": False}), 1)
    x = nag_jax.eval_params(PARAMS, after_one_step(masked.gradient_transformation()))
    assert_shifted(x, {"a": {"w": 1.0, "b": 1.0}, "c": 0.0})


class AverageState(NamedTuple):
    """Knows a tree, which has no leaves where it is masked."""

    mean: Any

    def iterate(self, params):
        return self.mean


def test_a_state_may_return_the_part_that_it_holds():
    optimizer = optax.GradientTransformation(
        lambda p: AverageState(jax.tree.map(lambda x: 2 * x, p)), lambda u, s, p=None: (u, s)
    )
    masked = optax.masked(optimizer, {"a": {"w": True, "b": False}, "c": False})
    x = nag_jax.eval_params(PARAMS, masked.init(PARAMS))
    chex.assert_trees_all_equal(x, PARAMS | {"a": {"w": 2 * jnp.ones(3), "b": jnp.ones(2)}})
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Dict(p=nnx.Param(jnp.ones(3)))
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param).opt_state
    np.testing.assert_array_equal(
        jax.tree.leaves(nag_jax.eval_params(nnx.state(model), state))[0], 2 * jnp.ones(3)
    )
    wide = AverageState(jnp.ones(3))
    assert nag_jax.eval_params(jnp.zeros(3, jnp.bfloat16), wide).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"params has shape \(3,\) in params and \(2,\)"):
        nag_jax.eval_params(ZERO, AverageState(jnp.ones(2)))


FREE = optax.contrib.schedule_free_adamw(0.1, b1=0.8)
SCHEDULE_FREE = {
    "alone": (FREE, lambda state: state),
    "chain": (optax.chain(optax.clip(1.0), FREE), lambda state: state[1]),
    "of nag": (
        optax.contrib.schedule_free(nag_jax.nag(0.1), 0.1, b1=0.8),
        lambda state: state,
    ),
    "injected": (
        optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(0.1),
        lambda state: state.inner_state,
    ),
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_of_optax(name):
    optimizer, inside = SCHEDULE_FREE[name]
    params, state = run(optimizer)[-1]
    expected = optax.contrib.schedule_free_eval_params(inside(state), params)
    assert np.max(np.abs(expected - params)) > 1e-4
    for evaluate in (nag_jax.eval_params, jax.jit(nag_jax.eval_params)):
        np.testing.assert_allclose(evaluate(params, state), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="link after the accelerated optimizer"):
        nag_jax.eval_params(ZERO, optax.chain(optimizer, optax.scale(0.5)).init(ZERO))


def test_schedule_free_through_masks_flax_and_vmap():
    free = optax.contrib.schedule_free_sgd(0.1, b1=0.5)
    masked = optax.masked(free, {"a": {"w": True, "b": False}, "c": False})
    x = nag_jax.eval_params(jax.tree.map(lambda p: 3 * p, PARAMS), masked.init(PARAMS))
    expected = {"a": {"w": 5 * jnp.ones(3), "b": 3 * jnp.ones(2)}, "c": 3 * jnp.ones(4)}
    chex.assert_trees_all_close(x, expected)
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Dict(p=nnx.Param(jnp.ones(3)))
    optimizer = nnx.Optimizer(model, free, wrt=nnx.Param)
    model.p[...] = 3 * jnp.ones(3)
    x = nag_jax.eval_params(nnx.state(model), optimizer.opt_state)
    np.testing.assert_allclose(jax.tree.leaves(x)[0], 5.0)
    half = jnp.ones(3, jnp.bfloat16)
    assert nag_jax.eval_params(half, free.init(half)).dtype == jnp.bfloat16
    rows = jnp.ones((3, 3))
    with pytest.raises(ValueError, match=r"a stack of \(3,\) states"):
        nag_jax.eval_params(rows, jax.vmap(free.init)(rows))


NOTHING = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1),
    "optax's nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "with a tail": optax.chain(optax.adam(0.1), optax.clip(0.1)),
    "named": optax.named_chain(("adam", optax.adam(0.1)), ("clip", optax.clip(0.1))),
    "multisteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "wrapper": optax.contrib.mechanize(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_params_are_returned_where_nothing_knows_an_iterate(name):
    x = nag_jax.eval_params(PARAMS, NOTHING[name].init(PARAMS))
    assert jax.tree.structure(x) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (x, PARAMS)), strict=True))
    nag_jax.minimize(loss, ZERO, NOTHING[name], max_steps=2)


def test_minimize_takes_optimizers_with_a_bare_state():
    momentum = optax.GradientTransformation(
        jnp.zeros_like, lambda g, m, p=None: (-0.5 * (g + m), 0.5 * (g + m))
    )
    bare = optax.GradientTransformation(lambda p: None, lambda g, s, p=None: (-g, s))
    for optimizer in (momentum, bare):
        assert nag_jax.minimize(loss, ZERO, optimizer, max_steps=3).steps == 3


def test_the_state_of_a_train_step():
    step = nag_jax.train_step(lambda p, batch: loss(p) + 0 * jnp.sum(batch), nag_jax.nag(0.1))
    params = jnp.zeros(3)
    state = step.init(params)
    for _ in range(20):
        params, state, _ = step(params, state, jnp.ones((8, 1)))
    expected = nag_jax.eval_params(*run(nag_jax.nag(0.1))[-1])
    np.testing.assert_allclose(nag_jax.eval_params(params, state), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [None, ZERO, PARAMS, [ZERO], {"m": PARAMS, "readout": ZERO[0]}], ids=range(5)
)
def test_what_is_not_a_state_is_refused(wrong):
    message = rf"must be the state of an optimizer, got {re.escape(type(wrong).__name__)}; pass"
    with pytest.raises(ValueError, match=message):
        nag_jax.eval_params(PARAMS, wrong)


def test_errors():
    state = after_one_step(nag_jax.nag(0.1))
    with pytest.raises(ValueError, match=r"call eval_params\(params, opt_state\), in that order"):
        nag_jax.eval_params(state, PARAMS | {"count": optax.EmptyState()})
    with pytest.raises(ValueError, match=r"does not belong to params: they have no \['c'\]"):
        nag_jax.eval_params({"a": PARAMS["a"]}, state)
    with pytest.raises(ValueError, match=r"\['c'\] has shape \(5,\) in params and \(4,\)"):
        nag_jax.eval_params(PARAMS | {"c": jnp.ones(5)}, state)


@chex.dataclass
class Train:
    first: Any
    second: Any


def test_two_states_for_one_parameter_are_refused():
    nag = nag_jax.nag(0.1)
    train = Train(first=after_one_step(nag), second=nag.init(PARAMS))
    with pytest.raises(ValueError, match=r"more than one state .* parameter \['a'\]\['b'\]"):
        nag_jax.eval_params(PARAMS, train)
    assert_shifted(nag_jax.eval_params(PARAMS, Train(first=train.first, second=3)), ALL_SHIFTED)


def test_a_stack_of_states_is_refused():
    params = jnp.ones((3, 3))
    for optimizer in (
        nag_jax.nag(0.1), nag_jax.averaged(optax.sgd(0.1)), nag_jax.backtracking(),
        nag_jax.lookahead(optax.sgd(0.1)), nag_jax.monotone_fista(loss),
        nag_jax.nag_auto(evaluate="iterate"),
    ):  # fmt: skip
        state = jax.vmap(optimizer.init)(params)
        with pytest.raises(ValueError, match=r"a stack of \(3,\) states.*jax\.vmap"):
            nag_jax.eval_params(params, state)
        jax.vmap(nag_jax.eval_params)(params, state)
    optimizer = nag_jax.nag(0.1)
    _, state = jax.vmap(optimizer.update)(params, jax.vmap(optimizer.init)(params))
    np.testing.assert_allclose(jax.vmap(nag_jax.eval_params)(params, state), 1.09, rtol=1e-6)
