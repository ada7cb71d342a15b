"""Every factory refuses what is not a number when it is called, and says what is allowed."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import _checks, proximal, rules, schedules

# Arguments that are plain numbers: a schedule of one would fail later, or be taken for a number.
NUMBERS = {
    rules.chambolle_dossal: ("a",),
    rules.strongly_convex: ("q",),
    rules.tmm: ("q",),
    rules.item: ("q",),
    rules.sc_ogm: ("q",),
    rules.lessard: ("alpha", "beta", "gamma"),
    rules.robust_momentum: ("q", "robustness"),
    rules.gpa: ("momentum", "interpolation"),
    rules.ema_nesterov: ("decay",),
    rules.mass: ("alpha", "kappa"),
    rules.accsgd: ("kappa", "xi", "small_const"),
    schedules.sutskever: (
        "max_momentum", "period", "total_steps", "final_steps", "final_momentum"),
    schedules.convex: ("a",),
    schedules.follow_learning_rate: ("peak", "start", "end"),
    schedules.strongly_convex: ("q",),
    schedules.linear: ("momentum", "initial", "warmup_steps", "final", "cooldown_steps"),
    nag_jax.averaged: ("power",),
    nag_jax.adanag: ("initial",),
    nag_jax.backtracking: ("initial", "grow", "grow_at_first", "shrink"),
    nag_jax.nag_then_sgd: (
        "learning_rate", "momentum", "switch_step", "transition_steps", "sgd_learning_rate"),
    nag_jax.tmm: ("q",),
    nag_jax.minimize: ("tol", "max_steps"),
    nag_jax.largest_curvature: ("max_steps",),
    nag_jax.int8_blocks: ("seed", "block_size", "min_size", "shards"),
    nag_jax.stochastic_bfloat16: ("seed",),
    nag_jax.stochastic_rounding: ("seed",),
    proximal.l1: ("strength",),
    proximal.group_l1: ("strength",),
    proximal.elastic_net: ("l1", "l2"),
    proximal.sorted_l1: ("strength",),
    proximal.total_variation: ("strength",),
    proximal.nuclear: ("strength",),
    proximal.box: ("low", "high"),
}  # fmt: skip
# And those that may be schedules.
SCHEDULED = {
    rules.nesterov: ("momentum",),
    rules.trace: ("momentum", "learning_rate"),
    rules.estimate_sequence: ("learning_rate", "strong_convexity"),
    rules.heavy_ball: ("momentum",),
    rules.qhm: ("momentum", "nu"),
    rules.agnes: ("momentum", "ratio"),
    rules.ema_nesterov: ("lookahead",),
    rules.srsgd: ("period",),
    nag_jax.nag: ("learning_rate", "momentum", "weight_decay"),
    nag_jax.nag_then_sgd: ("weight_decay",),
    nag_jax.nag_auto: ("learning_rate", "momentum"),
    nag_jax.fista: ("learning_rate",),
    nag_jax.ogm: ("learning_rate",),
    nag_jax.tmm: ("learning_rate",),
    nag_jax.lookahead: ("learning_rate",),
    nag_jax.snoo: ("learning_rate", "momentum"),
    nag_jax.diloco: ("learning_rate", "momentum"),
    nag_jax.pogm: ("learning_rate",),
    nag_jax.optista: ("learning_rate",),
    proximal.prox_step: ("learning_rate",),
}
VALID = dict(
    fun=jnp.sum, params=jnp.ones(2), optimizer=optax.sgd(0.1), prox=proximal.l1(0.1), horizon=3,
    inner=optax.sgd(0.1), axis_name="data", switch_step=5, learning_rate=0.1, momentum=0.5, q=0.1,
    alpha=0.5, beta=0.5, gamma=0.5, strength=0.1, l1=0.1, l2=0.1, low=0.0, high=1.0,
    peak=0.5, start=2, end=5,
)  # fmt: skip
WRONG = "0.5", b"0.5", [0.5], 1j, object(), np.ones(3), np.ones(1)
arguments = lambda table: [(make, name) for make, names in table.items() for name in names]


def call(make, **given):
    """``make`` with valid arguments where it needs one, and those given."""
    needed = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    return make(**({name: VALID[name] for name in needed} | given))


@pytest.mark.parametrize(("make", "name"), arguments(NUMBERS) + arguments(SCHEDULED))
@pytest.mark.parametrize("wrong", WRONG, ids=map(str, range(len(WRONG))))
def test_what_is_no_number_is_refused(make, name, wrong):
    arrays = "strength", "l1", "l2", "low", "high"
    if name in arrays and isinstance(wrong, list | np.ndarray):
        call(make, **{name: wrong})
        return
    with pytest.raises(ValueError, match=f"{name}( = mu/L)? must be (in|a|an) "):
        call(make, **{name: wrong})


@pytest.mark.parametrize(("make", "name"), arguments(SCHEDULED))
def test_the_state_does_not_depend_on_how_a_number_is_given(make, name):
    """So that a checkpoint can be read after a number has become a schedule, or injected."""

    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    types = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

    def factory(value):
        link = call(make, **{name: value})
        return nag_jax.accelerate(link) if isinstance(link, rules.Rule) else link

    def types_after(value, steps=0):
        link = factory(value)
        state = link.init(params)
        for _ in range(steps):
            _, state = link.update(params, state, params)
        return types(state)

    number = 5.0 if name == "period" else 0.5
    schedule = optax.constant_schedule(number)
    expected = types_after(number)
    for value in [jnp.asarray(number), np.float32(number), schedule]:
        assert types_after(value) == expected
    if name == "weight_decay":
        assert types_after(0.0) == expected
    jax.jit(lambda value: chex.assert_equal(types_after(value), expected))(number)
    if make is not nag_jax.diloco:  # its update has to be inside of a mapped axis
        assert types_after(number, 2) == types_after(schedule, 2) == expected
    injected = optax.inject_hyperparams(factory)(number).init(params)
    assert types(injected.inner_state) == expected


@pytest.mark.parametrize("convention", ["optax", "sutskever"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}, lambda p: {"a": True, "b": False}])
def test_the_state_of_nag_is_one_tree(convention, decay, mask):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    plain = jax.tree.structure(nag_jax.nag(0.1).init(params))
    options = dict(convention=convention, decay=decay, weight_decay_mask=mask, weight_decay=0.1)
    assert jax.tree.structure(nag_jax.nag(0.1, **options).init(params)) == plain
    injected = optax.inject_hyperparams(nag_jax.nag, static_args="weight_decay_mask")
    state = injected(0.1, **options).init(params)
    assert jax.tree.structure(state.inner_state) == plain


def example_mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def half_step(tree, step=1.0):
    return jax.tree.map(lambda z: z / (1 + step), tree)


CALLABLES = {
    "nag, mask": (nag_jax.nag, dict(weight_decay=0.1, weight_decay_mask=example_mask)),
    "nag_then_sgd, mask": (
        nag_jax.nag_then_sgd, dict(weight_decay=0.1, weight_decay_mask=example_mask)),
    "nag, dtype": (nag_jax.nag, dict(accumulator_dtype=jnp.float32)),
    "fista, prox": (nag_jax.fista, dict(prox=half_step)),
    "fista, restart": (nag_jax.fista, dict(restart=nag_jax.restart.gradient)),
    "ogm, restart": (nag_jax.ogm, dict(restart=nag_jax.restart.speed)),
    "accelerate, restart": (
        nag_jax.accelerate, dict(rule=rules.fista(), restart=nag_jax.restart.every(3))),
    "backtracking, restart": (nag_jax.backtracking, dict(restart=nag_jax.restart.value)),
    "backtracking, own restart": (nag_jax.backtracking, dict(restart=lambda seen: (False, 0.0))),
    "pogm, prox": (nag_jax.pogm, dict(prox=half_step)),
    "prox_step, prox": (proximal.prox_step, dict(prox=half_step)),
    "monotone_fista, objective": (nag_jax.monotone_fista, dict(objective=lambda p: jnp.sum(p**2))),
    "lookahead, dtype": (nag_jax.lookahead, dict(slow_dtype=jnp.float32)),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLABLES)
def test_a_callable_that_is_not_a_schedule_must_be_static(case):
    """inject_hyperparams would call it with the step."""
    make, given = CALLABLES[case]
    (name,) = [argument for argument, value in given.items() if callable(value)]
    numbers = {n: VALID[n] for n, p in inspect.signature(make).parameters.items()
               if p.default is p.empty and n in VALID}  # fmt: skip
    lengths = [n for n in ("horizon", "switch_step", "transition_steps", "every")
               if n in inspect.signature(make).parameters]  # fmt: skip
    inject = lambda *static: optax.inject_hyperparams(make, static_args=static)(**(numbers | given))
    params = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=rf'static_args=\("{name}",\)'):
        inject(*lengths).init(params)
    optimizer = optax.with_extra_args_support(inject(name, *lengths))
    extra = dict(value=jnp.float32(3.0), value_fn=lambda p: jnp.sum(p**2) / 2)
    updates, _ = optimizer.update(params, optimizer.init(params), params, **extra)
    plain = optax.with_extra_args_support(make(**(numbers | given)))
    expected, _ = plain.update(params, plain.init(params), params, **extra)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", [True, False, np.True_, jnp.asarray(False), {"a": 1.0}])
def test_masks_are_trees_of_bools(wrong):
    with pytest.raises(ValueError, match="weight_decay_mask must be a tree of bools, a function"):
        nag_jax.nag(0.1, weight_decay=0.1, weight_decay_mask=wrong)
    for mask in ({"a": True}, {"a": np.True_}, {"a": jnp.asarray(True)}, {"a": {}, "b": [False]}):
        nag_jax.nag(0.1, weight_decay=0.1, weight_decay_mask=mask)


@pytest.mark.parametrize(("make", "name"), arguments(NUMBERS))
def test_a_schedule_in_place_of_a_number_is_refused(make, name):
    with pytest.raises(ValueError, match=f"{name}( = mu/L)? must be (a number|an int|in) ?.*got"):
        call(make, **{name: optax.constant_schedule(0.5)})


@pytest.mark.parametrize(("make", "name"), arguments(SCHEDULED))
def test_a_schedule_passes_where_one_is_allowed(make, name):
    call(make, **{name: optax.constant_schedule(0.5)})


def test_bounds():
    closed = functools.partial(_checks.check_range, "x", low=0.0, high=1.0, high_closed=True)
    for fine in (0, 1, 0.5, np.float32(1), jnp.ones([])):
        closed(value=fine)
    half = functools.partial(_checks.check_range, "x", low=0.0, high=1.0, low_open=True)
    half(value=0.5)
    for wrong, check, allowed in (
        (1.5, closed, "[0, 1]"), (-1, closed, "[0, 1]"), (np.nan, closed, "[0, 1]"),
        (1, half, "(0, 1)"), (0, half, "(0, 1)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"x must be in") as error:
            check(value=wrong)
        assert str(error.value) == f"x must be in {allowed}, got {wrong:g}"
    with pytest.raises(ValueError, match=r"a number in \[0, 1\], not a schedule, got <function"):
        closed(value=optax.constant_schedule(0.5))
    with pytest.raises(ValueError, match=r"a number in \[0, 1\], got 1000"):
        closed(value=10**400)
    jax.jit(lambda x: closed(value=x))(2.0)  # known at run time only
