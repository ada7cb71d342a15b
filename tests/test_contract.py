"""What holds for every optimizer and rule. A new one needs an entry in CASES or RULES.

Most of the cost is compiling, so each case has one compiled step that many tests share. What the
rules achieve is in test_rules_bounds.py and test_rules_identities.py.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nag_jax
from nag_jax import rules, schedules


# Each factory below makes the public one of its name into an optimizer with a learning rate.
def accelerate(learning_rate, momentum):
    kernel = nag_jax.accelerate(rules.nesterov(momentum))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate), kernel)


def averaged(learning_rate):
    return nag_jax.averaged(nag_jax.nag(learning_rate), power=8.0)


def outer(learning_rate, every):
    return nag_jax.outer(optax.sgd(learning_rate), nag_jax.nag(1.0, 0.5), every=every)


def lookahead(learning_rate, every):
    return nag_jax.lookahead(nag_jax.nag(learning_rate, 0.5), 0.8, every=every)


def snoo(learning_rate, every, slow_dtype=None):
    inner = nag_jax.nag(learning_rate, 0.5)
    return nag_jax.snoo(inner, momentum=0.5, every=every, slow_dtype=slow_dtype)


of_one_worker = functools.partial(
    jax.vmap, in_axes=None, out_axes=None, axis_size=1, axis_name="workers"
)


def diloco(learning_rate, every):
    return of_workers(nag_jax.diloco(nag_jax.nag(learning_rate, 0.5), "workers", every=every))


def streaming(learning_rate, every):
    inner = nag_jax.nag(learning_rate, 0.5)
    options = dict(every=every, delay=1, mixing=0.5, weighted=True)
    return of_workers(nag_jax.diloco(inner, "workers", **options))


def of_workers(optimizer):
    """``optimizer`` of one worker, inside the axis that it needs."""

    def update(*arguments, **extra):
        return of_one_worker(lambda *arguments: optimizer.update(*arguments, **extra))(*arguments)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def monotone_fista(learning_rate):
    return optax.chain(optax.sgd(learning_rate), nag_jax.monotone_fista(objective))


def objective(params):
    """The loss of most tests, and something for the trees of the others."""
    return loss(params) if isinstance(params, dict) and "layers" in params else size(params)


def stochastic_rounding(learning_rate):
    return optax.chain(nag_jax.nag(learning_rate), nag_jax.stochastic_rounding())


def zero1(learning_rate):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return nag_jax.zero1(nag_jax.nag(learning_rate), mesh)


def accelerated(rule):
    """The kernel with this rule, as an optimizer; inject_hyperparams reads its signature."""

    @functools.wraps(rule)
    def factory(*args, **kwargs):
        made = rule(*args, **kwargs)
        links = optax.sgd(0.1), nag_jax.accelerate(made)
        return optax.chain(*(reversed(links) if made.before_learning_rate else links))

    return factory


class Case(NamedTuple):
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any]
    static: Collection[str] = ()  # arguments that inject_hyperparams must leave alone
    copies_params: bool = False  # into its state, which so needs their values
    evaluates: bool = False  # calls the loss itself, so it must see all of params
    rounds: bool = False  # the sum of params and update, so it returns float32 for bfloat16
    moves: bool = False  # params to a mesh, so that its second step has other types
    # A copy of its buffer on CPU: the old one is needed after it is written. See test_chips.py.
    copies: bool = False
    rounding: float = 1e-6  # how far two compilations may differ

    def make(self):
        return self.factory(**self.kwargs)

    def inject(self):
        return optax.inject_hyperparams(self.factory, self.static)(**self.kwargs)


HALVING = optax.exponential_decay(0.1, 50, 0.5)
CASES = {
    "nag": Case(nag_jax.nag, dict(learning_rate=0.1)),
    "nag sutskever": Case(nag_jax.nag, dict(learning_rate=0.1, convention="sutskever")),
    "nag scheduled": Case(
        nag_jax.nag, dict(learning_rate=HALVING, momentum=schedules.sutskever(0.9, period=5))
    ),
    "nag sutskever scheduled": Case(
        nag_jax.nag,
        dict(learning_rate=HALVING, momentum=schedules.convex(), convention="sutskever"),
    ),
    "nag coupled": Case(nag_jax.nag, dict(learning_rate=0.1, weight_decay=0.01)),
    "nag decoupled": Case(
        nag_jax.nag,
        dict(learning_rate=HALVING, weight_decay=0.01, decay="decoupled", convention="sutskever"),
    ),
    "nag float32 buffer": Case(
        nag_jax.nag,
        dict(learning_rate=0.1, accumulator_dtype=jnp.float32),
        static=("accumulator_dtype",),
    ),
    "nag stochastic bfloat16": Case(
        nag_jax.nag, dict(learning_rate=0.1, accumulator_dtype=nag_jax.stochastic_bfloat16())
    ),
    "nag sutskever int8": Case(
        nag_jax.nag,
        dict(
            learning_rate=0.1,
            convention="sutskever",
            accumulator_dtype=nag_jax.int8_blocks(min_size=1),
        ),
    ),
    "fista int8": Case(
        nag_jax.fista,
        dict(learning_rate=0.1, accumulator_dtype=nag_jax.int8_blocks(min_size=1)),
        static=("prox", "restart"),
    ),
    "nag_then_sgd": Case(
        nag_jax.nag_then_sgd,
        dict(learning_rate=0.05, switch_step=20, transition_steps=5, sgd_learning_rate=0.1),
        static=("switch_step", "transition_steps"),
    ),
    "fista": Case(
        nag_jax.fista,
        dict(learning_rate=0.1),
        static=("prox", "restart"),
        copies=True,  # on CPU, where the sums for a restart are not in the loop of the update
    ),
    "fista scheduled": Case(
        nag_jax.fista,
        dict(learning_rate=HALVING, prox=nag_jax.proximal.elastic_net(1e-4, 1e-4), restart="speed"),
        static=("prox", "restart"),
        copies=True,
    ),
    "monotone_fista": Case(monotone_fista, dict(learning_rate=0.1), evaluates=True, copies=True),
    "diloco": Case(
        diloco, dict(learning_rate=0.05, every=2), ("every",), copies_params=True, copies=True
    ),
    "streaming diloco": Case(
        streaming, dict(learning_rate=0.05, every=2), ("every",), copies_params=True, copies=True
    ),
    "snoo": Case(
        snoo, dict(learning_rate=0.05, every=3), ("every",), copies_params=True, copies=True
    ),
    "snoo float32 copy": Case(
        snoo,
        dict(learning_rate=HALVING, every=3, slow_dtype=jnp.float32),
        ("every", "slow_dtype"),
        copies_params=True,
        copies=True,
    ),
    "nag_auto": Case(  # copies on CPU only, like the restarts
        nag_jax.nag_auto, dict(learning_rate=1.0), copies=True, copies_params=True
    ),
    "nag_auto scheduled": Case(
        nag_jax.nag_auto,
        dict(learning_rate=HALVING, evaluate="iterate"),
        copies=True,
        copies_params=True,
    ),
    "pogm": Case(
        nag_jax.pogm,
        dict(learning_rate=0.1, prox=nag_jax.proximal.elastic_net(1e-4, 1e-4), horizon=30),
        static=("prox", "horizon"),
        copies=True,  # params and m both need the old two
    ),
    "optista scheduled": Case(
        nag_jax.optista,
        dict(learning_rate=HALVING, prox=nag_jax.proximal.elastic_net(1e-4, 1e-4), horizon=30),
        static=("prox", "horizon"),
        copies=True,
    ),
    # It copies on CPU only: its buffer moves by what params do, and XLA on CPU makes two loops.
    "averaged": Case(averaged, dict(learning_rate=0.1), copies=True),
    "clipped": Case(accelerate, dict(learning_rate=0.05, momentum=0.5)),
    "stochastic_rounding": Case(stochastic_rounding, dict(learning_rate=0.1), rounds=True),
    "zero1": Case(zero1, dict(learning_rate=0.1), moves=True),
    "backtracking": Case(
        nag_jax.backtracking,
        {},
        static=("prox", "restart", "axis_name"),
        evaluates=True,
        copies=True,
    ),
    "backtracking with a prox": Case(
        nag_jax.backtracking,
        dict(prox=nag_jax.proximal.elastic_net(1e-4, 1e-4), initial=1.0, restart="speed"),
        static=("prox", "restart", "initial", "axis_name"),
        evaluates=True,
        copies=True,
    ),
    "adanag": Case(nag_jax.adanag, {}, static=("initial", "axis_name"), copies=True, rounding=1e-4),
}
NOT_OPTIMIZERS = {
    "eval_params", "from_optax", "int8_blocks", "largest_curvature", "meeting", "minimize",
    "replicas_in_sync", "resynchronize", "stochastic_bfloat16", "train_step",
}  # fmt: skip
# What these do with trees is done by the code of fista, snoo and the kernel.
VARIANTS = {
    "ogm": Case(nag_jax.ogm, dict(learning_rate=0.1), static=("restart",)),
    "tmm": Case(nag_jax.tmm, dict(learning_rate=0.1, q=0.3)),
    "outer": Case(outer, dict(learning_rate=0.05, every=2), ("every",), copies_params=True),
    "lookahead": Case(lookahead, dict(learning_rate=0.05, every=2), ("every",), copies_params=True),
}
RULES = {
    "accsgd": dict(kappa=10.0, xi=3.0, small_const=0.7),
    "agnes": dict(momentum=0.9, ratio=0.1),
    "chambolle_dossal": dict(a=3.0),
    "constant": dict(coefficients=rules.Coefficients(beta=0.5, kappa=1.0)),
    "ema_nesterov": dict(decay=0.9, lookahead=0.5),
    "estimate_sequence": dict(learning_rate=0.1, strong_convexity=0.5),
    "fista": {},
    "gpa": dict(momentum=0.9, interpolation=0.7),
    "heavy_ball": dict(momentum=0.5),
    "item": dict(q=0.1),
    "lessard": dict(alpha=1.0, beta=0.5, gamma=0.3),
    "mass": dict(alpha=0.05, kappa=12.0),
    "nesterov": dict(momentum=0.8),
    "ogm": dict(horizon=30),
    "ogm_g": dict(horizon=100),
    "qhm": dict(momentum=0.9, nu=0.7),
    "robust_momentum": dict(q=0.1, robustness=0.5),
    "sc_ogm": dict(q=0.1),
    "srsgd": dict(period=5),
    "strongly_convex": dict(q=0.1),
    "tmm": dict(q=0.1),
    "trace": dict(momentum=0.8, learning_rate=0.1),
}
NOT_RULES = {"at_step", "first_step", "stability_limit"}
RULE_CASES = {
    f"rules.{name}": Case(accelerated(getattr(rules, name)), kwargs, static={"horizon"} & {*kwargs})
    for name, kwargs in RULES.items()
}
# There a link of optax that takes arrays only is what the gradient meets first.
ARRAYS_ONLY = ("clipped",)
pytestmark = pytest.mark.filterwarnings("ignore:momentum 0.98 in a")  # FISTA's, in bfloat16
EVERY_CASE = CASES | VARIANTS | RULE_CASES
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_name = pytest.mark.parametrize("name", CASES)
every_name_and_rule = pytest.mark.parametrize("name", EVERY_CASE)


def example_params(dtype=jnp.float32):
    return {
        "layers": [jnp.linspace(-1.0, 1.0, 8).reshape(8, 1).astype(dtype), None],
        "scale": jnp.asarray(0.5, dtype),
        "empty": {},
    }


def loss(params):
    (kernel, _), scale = params["layers"], params["scale"]
    return jnp.sum((jnp.abs(kernel) - 0.3) ** 2).real + jnp.abs(scale + 1.0) ** 2


def known(params, loss=loss):
    """What line searches and step sizes want to know; the others ignore it."""
    return dict(value=loss(params), value_fn=loss)


def step_of(optimizer, gradient=None, loss=loss):
    gradient = gradient or jax.grad(loss)

    def step(params, state):
        updates, state = optimizer.update(gradient(params), state, params, **known(params, loss))
        return optax.apply_updates(params, updates), state

    return step


class Program(NamedTuple):
    """An optimizer and its compiled step, which donates params and state."""

    optimizer: optax.GradientTransformationExtraArgs
    step: Callable[..., Any]
    traces: list[None]  # one for each time that the step was traced


def program_of(optimizer):
    traces = []
    conjugate = lambda params: jax.tree.map(jnp.conj, jax.grad(loss)(params))
    step = step_of(optimizer, conjugate)

    def counted(params, state):
        traces.append(None)
        return step(params, state)

    return Program(optimizer, jax.jit(counted, donate_argnums=(0, 1)), traces)


@functools.cache
def compiled(name):
    """The program of a case, which all tests share that call it with float32 params."""
    return program_of(EVERY_CASE[name].make())


@functools.cache
def injected(name):
    return program_of(EVERY_CASE[name].inject())


def run(program, params, steps=12):
    params = jax.tree.map(jnp.array, params)  # which the step may donate
    state = program.optimizer.init(params)
    for _ in range(steps):
        params, state = program.step(params, state)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def functions(module):
    """The public functions of a module."""
    return {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}


def test_every_optimizer_and_rule_is_a_case():
    names = lambda cases: {case.factory.__name__ for case in cases.values()}
    assert names(CASES | VARIANTS) == functions(nag_jax) - NOT_OPTIMIZERS | {"streaming"}
    assert names(RULE_CASES) == functions(rules) - NOT_RULES
    assert functions(nag_jax) >= NOT_OPTIMIZERS
    assert functions(rules) >= NOT_RULES


def minimized(params, state, start):
    return loss(nag_jax.eval_params(params, state)) < 0.02 * loss(start)


@every_name_and_rule
def test_minimizes(name):
    assert minimized(*run(compiled(name), example_params(), 100), example_params())


@pytest.mark.slow
@every_name
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_minimizes_in_other_dtypes_and_in_a_scan(name, dtype):
    program, params = program_of(CASES[name].make()), example_params(dtype)
    start = params, program.optimizer.init(params)
    body = lambda carry, _: (program.step(*carry), None)
    assert minimized(*jax.jit(lambda c: jax.lax.scan(body, c, length=100)[0])(start), params)


@every_case
@pytest.mark.parametrize(
    ("params_dtype", "gradient_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
     ("float32", "bfloat16"), ("float16", "float16"), ("complex64", "complex64")],
)  # fmt: skip
def test_state_and_update_types_are_stable(case, params_dtype, gradient_dtype):
    if case.rounds and params_dtype == "float16":
        pytest.skip("it refuses params of less than 32 bits other than bfloat16")
    optimizer = case.make()
    params = example_params(params_dtype)
    gradients = jax.tree.map(lambda p: jnp.ones_like(p, gradient_dtype), params)
    extra = known(params)
    update = lambda state: optimizer.update(gradients, state, params, **extra)
    state = jax.eval_shape(optimizer.init, params)  # types are known without compiling
    updates, new_state = jax.eval_shape(update, state)
    assert types(new_state) == types(state)  # so that it can be carried by a scan or a cond
    if "decay" not in str(case.kwargs):  # optax adds float32 params to bfloat16 gradients there
        rounded = case.rounds and params_dtype == "bfloat16"
        expected = {jnp.dtype("float32" if rounded else gradient_dtype)}
        assert {u.dtype for u in jax.tree.leaves(updates)} == expected


@every_name_and_rule
def test_compiles_once(name):
    program = compiled(name)
    params, state = run(program, example_params(), 2)
    traces = len(program.traces)
    assert traces == 1 + EVERY_CASE[name].moves
    for _ in range(3):
        params, state = program.step(params, state)
    assert len(program.traces) == traces


@every_name_and_rule
def test_donates_cleanly(name):  # warnings are errors: an unusable donation fails
    program = compiled(name)
    params = jax.tree.map(jnp.array, example_params())
    state = program.optimizer.init(params)
    for _ in range(3):
        old = params, state
        params, state = program.step(params, state)
    donated = [x.is_deleted() for x in jax.tree.leaves(old) if x.size > 1]
    assert donated
    assert all(donated)


@pytest.mark.slow
@every_name
def test_scan_vmap_and_eager_agree_with_a_jitted_loop(name):
    case, (optimizer, *_) = CASES[name], compiled(name)
    params, step = example_params(), step_of(optimizer)
    close = functools.partial(chex.assert_trees_all_close, rtol=case.rounding, atol=case.rounding)
    eager, state = params, optimizer.init(params)
    for _ in range(4):
        eager, state = step(eager, state)
    close(eager, run(compiled(name), params, 4)[0])
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    carry, body = (
        (stacked, jax.vmap(optimizer.init)(stacked)),
        lambda c, _: (jax.vmap(step)(*c), None),
    )
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=12)[0])(carry)
    for row in range(3):
        of_row = lambda tree, row=row: jax.tree.map(lambda p: p[row], tree)
        expected, _ = run(compiled(name), of_row(stacked))
        close(of_row(scanned), expected)


@every_name
def test_inject_hyperparams_gives_the_same_numbers(name):
    plain, other, case = compiled(name), injected(name), CASES[name]
    if case.kwargs.get("convention") == "sutskever" and callable(case.kwargs.get("momentum")):
        case = case._replace(kwargs=case.kwargs | {"momentum": 0.9})  # see test_rules.py
        plain, other = program_of(case.make()), program_of(case.inject())
    expected, expected_state = run(plain, example_params())
    actual, state = run(other, example_params())
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        nag_jax.eval_params(actual, state),
        nag_jax.eval_params(expected, expected_state),
        rtol=1e-5,
        atol=1e-6,
    )


@every_name
def test_learning_rate_set_in_the_state_is_used_without_retracing(name):
    if callable(CASES[name].kwargs.get("learning_rate", callable)):
        return  # there is none, or optax computes a scheduled hyperparameter anew at each step
    program, results = injected(name), []
    for rate in (None, 0.02):
        params = jax.tree.map(jnp.array, example_params())
        params, state = program.step(params, program.optimizer.init(params))
        if rate is not None:
            rates = {"learning_rate": jnp.float32(rate)}
            state = state._replace(hyperparams=state.hyperparams | rates)
        results.append(loss(program.step(params, state)[0]))
    assert results[0] != results[1]
    assert len(program.traces) == 1 or CASES[name].moves


@every_case
def test_extra_arguments_are_accepted(case):
    optimizer, params = case.make(), example_params()
    gradients = jax.grad(loss)(params)
    needed = known(params) if "learning_rate" not in case.kwargs else {}
    plain = optimizer.update(gradients, optimizer.init(params), params, **needed)
    extra = known(params) | dict(grad=gradients, unknown="x")
    extra = optimizer.update(gradients, optimizer.init(params), params, **extra)
    chex.assert_trees_all_equal(plain, extra)


@every_case
def test_abstract_init(case):
    params = example_params()
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    optimizer = case.make()
    state = optimizer.init(params)
    if not case.copies_params:
        chex.assert_trees_all_equal(optimizer.init(abstract), state)
    evaluated = jax.eval_shape(optimizer.init, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(evaluated, state)


@every_case
def test_updates_in_place(case):
    """The compiled, donated step copies no params-sized buffer."""
    if case.copies:
        pytest.skip("XLA does not see, or it is not so, that the old buffer is done with")
    assert not copies(case.make())


@pytest.mark.parametrize("momentum", [0.5, 0.25, 0.9])
@pytest.mark.parametrize("convention", ["optax", "sutskever"])
def test_updates_in_place_at_powers_of_two(momentum, convention):
    assert not copies(nag_jax.nag(0.1, momentum, convention=convention))


def test_copies_are_seen_where_there_are_some():
    def rewritten(updates, state, params=None, **_):
        m = jax.tree.map(lambda u, m: 0.9 * (m + u), updates, state)
        return jax.tree.map(lambda u, m: u + m, updates, m), m

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    assert copies(optax.GradientTransformationExtraArgs(zeros, rewritten))


def copies(optimizer):
    """The copy instructions over whole buffers in the optimized program of one step."""
    params = {"a": jnp.ones((257, 129)), "b": jnp.ones((33, 65))}
    squares = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    step = lambda p, s, g: step_of(optimizer, lambda _: g, squares)(p, s)
    arguments = params, optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    program = programs.compiled(lowered).as_text()
    return re.findall(r"f32\[(?:257,129|33,65)\]\S* copy\(.*", program)


@every_case
def test_sharding_is_kept(case):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {"layers": [jax.device_put(jnp.ones((16, 3)), rows), None], "scale": jnp.ones([])}
    optimizer = case.make()
    state = optimizer.init(params)
    step = jax.jit(step_of(optimizer))
    for _ in range(3):
        big = [x for x in jax.tree.leaves((params, state)) if x.size == 48]
        assert len(big) >= 2
        for x in big:
            assert x.sharding.is_equivalent_to(rows, x.ndim)
            assert x.addressable_shards[0].data.shape == (2, 3)
        params, state = step(params, state)


@every_case
def test_masked_parameters_stay(case):
    if case.evaluates:
        pytest.skip("the loss cannot be evaluated without the parameters that are masked out")
    mask = {"layers": True, "scale": False, "empty": True}
    others = jax.tree.map(lambda x: not x, mask)
    frozen = optax.masked(optax.set_to_zero(), others)

    def trained(optimizer, steps=3):
        optimizer = optax.chain(frozen, optimizer)
        params, step = example_params(), step_of(optimizer)
        state = optimizer.init(params)
        for _ in range(steps):
            params, state = step(params, state)
        return params, state

    params = example_params()
    after, state = trained(optax.masked(case.make(), mask))
    assert after["scale"] == params["scale"]
    assert nag_jax.eval_params(after, state)["scale"] == params["scale"]
    expected, _ = trained(case.make())
    chex.assert_trees_all_close(after["layers"], expected["layers"], rtol=1e-6)


@every_case
def test_a_python_number_is_a_parameter(case):
    numbers = example_params() | {"scale": 0.5}
    step = step_of(case.make())
    actual, expected = (step(p, case.make().init(p)) for p in (numbers, example_params()))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert types(actual[1]) == types(expected[1])


@every_case
def test_a_python_number_is_a_gradient(case):
    if any(case is CASES[name] for name in ARRAYS_ONLY):
        pytest.skip("optax.clip_by_global_norm takes arrays only")
    optimizer, params = case.make(), example_params()
    arrays = jax.grad(loss)(params)
    numbers = arrays | {"scale": float(arrays["scale"])}
    results = []
    for gradients in (numbers, arrays):
        state = optimizer.init(params)
        for _ in range(3):
            given = known(params) | {"grad": gradients}
            updates, state = optimizer.update(gradients, state, params, **given)
        results.append((optax.apply_updates(params, updates), state))
    chex.assert_trees_all_equal(*results)
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)


@every_case
def test_inside_multi_steps(case):
    params = example_params()
    multi = optax.MultiSteps(case.make(), 3).gradient_transformation()
    state, step = multi.init(params), jax.jit(lambda s: multi.update(
        jax.grad(loss)(params), s, params, **known(params)))  # fmt: skip
    for _ in range(2):
        updates, state = step(state)
        assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    updates, _ = step(state)
    single = case.make()
    arguments = jax.grad(loss)(params), single.init(params), params
    expected = single.update(*arguments, **known(params))[0]
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@every_case
def test_equinox_modules_and_none_gradients(case):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(1, 1, 1, 1, key=jax.random.key(0))  # of few shapes, since each is compiled
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = case.make()
    squares = lambda p: jnp.sum(eqx.combine(p, static)(jnp.ones(1)) ** 2)
    gradients, extra = jax.grad(squares)(params), known(params, squares)
    updates, state = optimizer.update(gradients, optimizer.init(params), params, **extra)
    trained = eqx.apply_updates(params, updates)
    assert jax.tree.structure(nag_jax.eval_params(trained, state)) == jax.tree.structure(params)
    frozen = eqx.tree_at(lambda g: g.layers[0].bias, gradients, None)
    updates, new_state = optimizer.update(frozen, state, params, **extra)
    assert updates.layers[0].bias is None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def size(tree):
    """The square of it, as far as it can be trained."""
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(jnp.sum(x**2) for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))


EVERY = {name: case.make for name, case in (CASES | VARIANTS).items()} | {
    "prox_step": lambda: nag_jax.proximal.prox_step(nag_jax.proximal.l1(0.1), 0.1),
    "averaged descent": lambda: nag_jax.averaged(optax.sgd(0.1)),
}
every_optimizer = pytest.mark.parametrize("name", EVERY)


def trained_by(params, updates):
    """As ``eqx.apply_updates``: what has no update stays."""
    add = lambda u, p: p if u is None else (p + u).astype(p.dtype)
    return jax.tree.map(add, updates, params, is_leaf=lambda node: node is None)


@every_optimizer
def test_a_leaf_that_cannot_be_trained_is_named_at_init(name):
    leaves = {
        "dtype int32": jnp.arange(2),
        "dtype bool": jnp.ones(2, bool),
        "dtype int8": jax.ShapeDtypeStruct((2,), jnp.int8),
        "dtype key<fry>": jax.random.key(0),
        "type str": "relu",
        "type type": float,
        "type function": loss,
    }
    for got, leaf in leaves.items():
        needs = "needs floating-point or complex parameters. Exclude it with optax.masked, or pass"
        if name == "zero1" and "type" in got.split():
            needs = "zero1 needs arrays. Pass"  # jax.jit takes nothing else
        message = re.escape(f"parameter ['layers'][1] has {got}; ") + ".*" + re.escape(needs)
        with pytest.raises(ValueError, match=message):
            EVERY[name]().init({"layers": [jnp.ones(3), leaf], "scale": jnp.ones([])})


@functools.cache
def partly_frozen(name):
    """The optimizer, params with a leaf that has no gradient, and a compiled step."""
    params = {"frozen": jnp.linspace(1.0, 2.0, 3), "free": jnp.ones(3), "none": None}
    optimizer = EVERY[name]()
    update = optax.with_extra_args_support(optimizer).update

    def step(params, state):
        gradients = {"frozen": None, "free": -0.3 * params["free"], "none": None}
        updates, state = update(gradients, state, params, **known(params, size))
        assert updates["frozen"] is None
        return trained_by(params, updates), state

    return optimizer, params, jax.jit(step)


@every_optimizer
def test_a_leaf_without_a_gradient_stays_as_it_is(name):
    optimizer, params, step = partly_frozen(name)
    after, state = params, optimizer.init(params)
    start = jax.tree.structure(state)
    for _ in range(3):
        after, state = step(after, state)
    assert jax.tree.structure(state) == start
    np.testing.assert_array_equal(after["frozen"], params["frozen"])
    assert np.all(after["free"] != params["free"])
    if name not in ("prox_step", "stochastic_rounding"):  # there is nothing to evaluate
        np.testing.assert_array_equal(nag_jax.eval_params(after, state)["frozen"], after["frozen"])


@every_optimizer
def test_no_count_of_steps_wraps(name):
    optimizer, params, step = partly_frozen(name)
    most = np.iinfo(np.int32).max
    count = lambda x: jnp.full_like(x, most) if x.dtype == jnp.int32 else x
    _, state = step(params, jax.tree.map(count, optimizer.init(params)))
    assert all(np.all(x >= 0) for x in jax.tree.leaves(state) if x.dtype == jnp.int32)


@every_optimizer
def test_a_whole_equinox_model_is_updated_as_its_parameters_are(name):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, jnp.arange(4))  # not to be trained
    params, static = eqx.partition(model, eqx.is_inexact_array)
    if name == "zero1":  # which spreads arrays over devices, used or not
        model = eqx.combine(params, eqx.filter(static, eqx.is_array, inverse=True))
    optimizer = optax.with_extra_args_support(EVERY[name]())
    gradients, state = params, optimizer.init(params)

    def program(given):
        update = lambda g, s: optimizer.update(g, s, given, value=1.0, value_fn=size)
        return str(jax.make_jaxpr(update)(gradients, state))

    assert program(model) == program(params)
