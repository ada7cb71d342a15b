"""Hyperparameters as arrays: every factory under inject_hyperparams gives the same numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import nag_jax
from nag_jax import proximal, rules, schedules

RULES = {
    rules.nesterov: dict(momentum=0.8),
    rules.trace: dict(momentum=0.8, learning_rate=0.1),
    rules.fista: {},
    rules.chambolle_dossal: dict(a=3.0),
    rules.strongly_convex: dict(q=0.1),
    rules.estimate_sequence: dict(learning_rate=0.1, strong_convexity=0.5),
    rules.ogm: dict(horizon=8),
    rules.ogm_g: dict(horizon=8),
    rules.tmm: dict(q=0.1),
    rules.item: dict(q=0.1),
    rules.sc_ogm: dict(q=0.1),
    rules.lessard: dict(alpha=1.0, beta=0.5, gamma=0.3),
    rules.robust_momentum: dict(q=0.1, robustness=0.5),
    rules.heavy_ball: dict(momentum=0.5),
    rules.qhm: dict(momentum=0.9, nu=0.7),
    rules.gpa: dict(momentum=0.9, interpolation=0.7),
    rules.agnes: dict(momentum=0.9, ratio=0.1),
    rules.ema_nesterov: dict(decay=0.9, lookahead=0.5),
    rules.mass: dict(alpha=0.05, kappa=12.0),
    rules.accsgd: dict(kappa=1000.0, xi=10.0, small_const=0.7),
    rules.srsgd: dict(period=5),
}
OTHERS = {
    nag_jax.nag: dict(learning_rate=0.1, momentum=0.8, weight_decay=0.1),
    nag_jax.nag_then_sgd: dict(
        learning_rate=0.1, momentum=0.8, sgd_learning_rate=0.2, switch_step=8, transition_steps=4),
    nag_jax.nag_auto: dict(learning_rate=1.0, momentum=0.8),
    nag_jax.fista: dict(learning_rate=0.1),
    nag_jax.ogm: dict(learning_rate=0.1),
    nag_jax.tmm: dict(learning_rate=0.1, q=0.1),
    nag_jax.pogm: dict(learning_rate=0.1, prox=proximal.l1(0.1), horizon=8),
    nag_jax.optista: dict(learning_rate=0.1, prox=proximal.l1(0.1), horizon=8),
    nag_jax.backtracking: dict(initial=0.3, grow=1.1, grow_at_first=1.2, shrink=0.6),
    nag_jax.adanag: dict(initial=0.01),
    nag_jax.averaged: dict(optimizer=optax.sgd(0.1), power=3.0),
    nag_jax.lookahead: dict(inner=optax.sgd(0.1), learning_rate=0.5, every=2),
    nag_jax.snoo: dict(inner=optax.sgd(0.1), learning_rate=0.5, momentum=0.3, every=2),
    proximal.prox_step: dict(prox=proximal.l1(0.1), learning_rate=0.1),
}  # fmt: skip
STATIC = ("horizon", "every", "switch_step", "transition_steps", "prox", "restart", "optimizer",
    "inner")  # fmt: skip


def in_a_chain(rule):
    @functools.wraps(rule)  # inject_hyperparams reads the signature
    def factory(*args, **kwargs):
        return optax.chain(optax.sgd(0.1), nag_jax.accelerate(rule(*args, **kwargs)))

    return factory


FACTORIES = {f"rules.{rule.__name__}": (in_a_chain(rule), RULES[rule]) for rule in RULES}
FACTORIES |= {make.__name__: (make, OTHERS[make]) for make in OTHERS}


def loss(params):
    return jnp.sum(jnp.array([1.0, 0.1]) * (params - 1) ** 2)


def trajectory(optimizer):
    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(g, state, params, value=value, grad=g, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params, points = jnp.array([2.0, -1.0]), []
    state = optimizer.init(params)
    for _ in range(12):
        params, state = step(params, state)
        points.append((params, nag_jax.eval_params(params, state)))
    return points


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORIES)
def test_injected_numbers_are_those_given(name):
    make, numbers = FACTORIES[name]
    static = [argument for argument in STATIC if argument in numbers]
    injected = optax.inject_hyperparams(make, static_args=static)(**numbers)
    chex.assert_trees_all_close(
        trajectory(injected), trajectory(make(**numbers)), rtol=1e-4, atol=1e-5
    )


ALONE = [(rule, name) for rule, given in RULES.items() for name in given if name != "horizon"]


@pytest.mark.parametrize(("rule", "name"), ALONE)
@pytest.mark.filterwarnings("ignore:momentum")
def test_one_argument_may_be_traced_alone(rule, name):
    params = jnp.ones(3, jnp.bfloat16)

    def two_steps(value):
        link = nag_jax.accelerate(rule(**(RULES[rule] | {name: value})))
        _, state = link.update(params, link.init(params))
        return link.update(params, state)

    given = RULES[rule][name]
    chex.assert_trees_all_close(jax.jit(two_steps)(given), two_steps(given), rtol=1e-2)


SCHEDULES = [
    (schedules.convex, dict(a=2.0)), (schedules.strongly_convex, dict(q=0.1)),
    (schedules.linear, dict(momentum=0.9)),
    (schedules.linear, dict(momentum=0.9, initial=0.1, warmup_steps=9)),
    (schedules.linear, dict(momentum=0.9, final=0.5, cooldown_steps=9, total_steps=9)),
    (schedules.sutskever, dict(max_momentum=0.6, period=1)),
    (schedules.sutskever, dict(period=2, total_steps=9, final_steps=5, final_momentum=0.1)),
]  # fmt: skip
SCHEDULE_LENGTHS = "warmup_steps", "cooldown_steps", "total_steps"


@pytest.mark.parametrize(("make", "given"), SCHEDULES)
def test_arguments_of_schedules_may_be_traced(make, given):
    fixed = SCHEDULE_LENGTHS if make is schedules.linear else ()
    static = {name: value for name, value in given.items() if name in fixed}
    traced = {name: value for name, value in given.items() if name not in fixed}
    at = lambda traced: jnp.stack([jnp.asarray(make(**static, **traced)(k)) for k in range(10)])
    chex.assert_trees_all_close(jax.jit(at)(traced), at(traced), rtol=1e-6)


LENGTHS = [
    (rules.ogm, "horizon"), (rules.ogm_g, "horizon"), (nag_jax.pogm, "horizon"),
    (nag_jax.optista, "horizon"), (nag_jax.lookahead, "every"), (nag_jax.snoo, "every"),
    (nag_jax.nag_then_sgd, "switch_step"), (nag_jax.nag_then_sgd, "transition_steps"),
    (schedules.linear, "warmup_steps"), (schedules.linear, "cooldown_steps"),
    (schedules.linear, "total_steps"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name"), LENGTHS)
def test_lengths_that_must_be_known_say_how(make, name):
    given = OTHERS.get(make, {}) | ({"momentum": 0.5} if make is schedules.linear else {})
    with pytest.raises(ValueError, match=rf'{name} must be .*static_args=\("{name}",\)'):
        jax.jit(lambda value: make(**(given | {name: value})) and 0)(5)
