"""docs/support.md: each cell of its tables is what happens when it is tried."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nag_jax
from nag_jax import proximal, restart, rules

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
NO, YES = "no", "yes"
TARGET = np.tile([1.0, -0.2, 0.5, 0.05], (16, 1))
SHRINK = proximal.l1(0.3)


def loss(params):
    return jnp.sum((params - TARGET) ** 2) / 2


def penalized(params):
    return loss(params) + 0.3 * jnp.sum(jnp.abs(params))


# The least arguments of each method; options are added to them.
METHODS = {
    "nag": (nag_jax.nag, dict(learning_rate=0.1)),
    "nag_then_sgd": (nag_jax.nag_then_sgd, dict(learning_rate=0.1, switch_step=30)),
    "nag_auto": (nag_jax.nag_auto, {}),
    "averaged": (nag_jax.averaged, dict(optimizer=nag_jax.nag(0.1))),
    "fista": (nag_jax.fista, dict(learning_rate=0.5)),
    "ogm": (nag_jax.ogm, dict(learning_rate=0.5)),
    "tmm": (nag_jax.tmm, dict(learning_rate=1.0, q=0.2)),
    "pogm": (nag_jax.pogm, dict(learning_rate=0.5, horizon=30, prox=SHRINK)),
    "optista": (nag_jax.optista, dict(learning_rate=0.5, horizon=30, prox=SHRINK)),
    "backtracking": (nag_jax.backtracking, {}),
    "adanag": (nag_jax.adanag, {}),
    "monotone_fista": (nag_jax.monotone_fista, dict(objective=penalized)),
    "lookahead": (nag_jax.lookahead, dict(inner=optax.sgd(0.1), every=2)),
    "snoo": (nag_jax.snoo, dict(inner=optax.sgd(0.1), every=2)),
    "outer": (
        nag_jax.outer, dict(inner=optax.sgd(0.1), outer_optimizer=nag_jax.nag(0.5), every=2)
    ),
    "diloco": (nag_jax.diloco, dict(inner=optax.sgd(0.1), axis_name="workers", every=2)),
}  # fmt: skip
RULES = {
    "nesterov": {}, "trace": {}, "fista": {}, "chambolle_dossal": {},
    "strongly_convex": dict(q=0.2),
    "estimate_sequence": dict(learning_rate=0.1), "ogm": {}, "ogm_g": dict(horizon=30),
    "tmm": dict(q=0.2), "item": dict(q=0.2), "sc_ogm": dict(q=0.2),
    "lessard": dict(alpha=1.0, beta=0.5, gamma=0.5), "robust_momentum": dict(q=0.2),
    "heavy_ball": {}, "qhm": {}, "gpa": {}, "agnes": {}, "ema_nesterov": {},
    "mass": {}, "accsgd": {}, "srsgd": {},
}  # fmt: skip


def table(heading):
    """The rows of the page below a heading by the name of their first cell."""
    lines = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "|" in line]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def make(name, **options):
    factory, least = METHODS[name]
    return factory(**(least | options))


def given(needs, params):
    """The arguments of update that a cell of the last column names."""
    known = dict(value=loss(params), value_fn=loss)
    return {name: known[name] for name in re.findall(r"\w+", needs) if name in known}


def stepper(optimizer, needs, name=""):
    """One step on the loss; what needs an axis gets one of a single worker."""

    def step(params, state):
        extra = given(needs, params)
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    if name != "diloco":
        return step
    one = jax.vmap(step, axis_name="workers")
    row = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return lambda *carry: jax.tree.map(lambda x: x[0], one(*row(carry)))


def run(optimizer, needs, name="", steps=30, start=None):
    params = jnp.zeros(TARGET.shape) if start is None else start
    step, state = jax.jit(stepper(optimizer, needs, name)), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def needs_value(name):
    for needs in (NO, "`value`", "`value`, `value_fn`"):
        try:
            run(make(name), needs, name, steps=1)
        except ValueError:
            continue
        return needs
    raise AssertionError(name)


def schedules(name, needs):
    """Which of the two a schedule can be given for, so that it changes the steps."""
    accepted = []
    for argument in ("learning_rate", "momentum"):
        if argument not in inspect.signature(METHODS[name][0]).parameters:
            continue
        # Up to step 4 what a constant gives, and another number later.
        change = lambda k: jnp.where(k < 4, 0.1, 0.05)
        try:
            changing, _ = run(make(name, **{argument: change}), needs, name, steps=12)
        except (TypeError, ValueError):
            continue
        constant, _ = run(make(name, **{argument: 0.1}), needs, name, steps=12)
        assert not np.allclose(changing, constant, rtol=1e-4)
        accepted.append(argument.replace("_", " "))
    return ", ".join(accepted) or NO


def prox(name, needs):
    """An argument, a link before it in the chain, or not at all."""
    solution = SHRINK(jnp.asarray(TARGET), 1.0)
    solves = lambda tx: np.allclose(
        nag_jax.eval_params(*run(tx, needs, name, steps=30)), solution, atol=2e-2
    )
    if "prox" in inspect.signature(METHODS[name][0]).parameters:
        assert solves(make(name, prox=SHRINK))
        return YES
    if name == "monotone_fista":
        chain = optax.chain(proximal.prox_step(SHRINK, 0.5), make(name))
        assert solves(chain)
        return "after `prox_step`"
    return NO


def restarts(name, needs):
    try:
        optimizer = make(name, restart=restart.every(5))
    except TypeError:
        return NO
    _, state = run(optimizer, needs, name, steps=12)
    assert optax.tree.get(state, "restarts") == 2
    return YES


def low_precision(name, needs):
    storage = nag_jax.int8_blocks(min_size=1)
    try:
        optimizer = make(name, accumulator_dtype=storage)
    except TypeError:
        return NO
    _, state = run(optimizer, needs, name, steps=2)
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state))
    return YES


def sharded(name, needs):
    """The state of sharded parameters is sharded, and the numbers are those of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    start = jnp.linspace(-1.0, 1.0, TARGET.size).reshape(TARGET.shape)
    params, state = run(make(name), needs, name, 3, jax.device_put(start, rows))
    large = [x for x in jax.tree.leaves((params, state)) if x.size == start.size]
    if not all(x.sharding.is_equivalent_to(rows, x.ndim) for x in large):
        return NO
    np.testing.assert_allclose(params, run(make(name), needs, name, 3, start)[0], rtol=1e-5)
    return YES


def try_method(name):
    needs = needs_value(name)
    checks = (schedules, prox, restarts, sharded, low_precision)
    return [*(check(name, needs) for check in checks), needs]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")  # step sizes that are found differ by rounding otherwise
@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_the_methods_is_what_happens(name):
    assert table("Methods")[name] == try_method(name)


def try_rule(name):
    accepted = []
    for argument in inspect.signature(getattr(rules, name)).parameters:
        constant = 5 if argument == "period" else 0.1
        schedule = lambda k, c=constant: c + 0 * k
        try:
            rule = getattr(rules, name)(**(RULES[name] | {argument: schedule}))
            rule.step(rule.init())
        except (TypeError, ValueError):
            continue
        accepted.append(f"`{argument}`")
    rule = getattr(rules, name)(**RULES[name])
    try:
        nag_jax.accelerate(rule, restart=restart.gradient).init(jnp.zeros(4))
    except ValueError:
        return [", ".join(accepted) or NO, NO]
    return [", ".join(accepted) or NO, YES]


@pytest.mark.parametrize("name", RULES)
def test_a_row_of_the_rules_is_what_happens(name):
    assert table("Rules")[name] == try_rule(name)


def test_every_method_and_rule_has_a_row():
    listed = lambda page: re.findall(
        r"autofunction:: (\w+)", (ROOT / "docs" / "api" / page).read_text()
    )
    others = {"from_optax", "meeting", "resynchronize"}
    assert set(METHODS) == set(table("Methods")) == set(listed("optimizers.rst")) - others
    others = {"constant", "first_step", "at_step", "stability_limit"}
    assert set(RULES) == set(table("Rules")) == set(listed("rules.rst")) - others
