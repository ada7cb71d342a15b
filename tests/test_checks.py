"""What is no number is refused by every factory where it is called, in words that say what is."""

import functools
import inspect

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
    rules.mass: ("alpha", "kappa"),
    rules.accsgd: ("kappa", "xi", "small_const"),
    schedules.sutskever: (
        "max_momentum", "period", "total_steps", "final_steps", "final_momentum"),
    schedules.convex: ("a",),
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
    arrays = proximal.l1, proximal.group_l1, proximal.elastic_net, proximal.box
    if make in arrays and isinstance(wrong, list | np.ndarray):
        call(make, **{name: wrong})
        return
    with pytest.raises(ValueError, match=f"{name}( = mu/L)? must be (in|a|an) "):
        call(make, **{name: wrong})


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
