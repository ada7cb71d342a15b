"""What every optimizer of the library keeps: a new one joins by one entry in CASES."""

import functools
import re
from collections.abc import Callable
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


def clipped(learning_rate, momentum):
    kernel = nag_jax.accelerate(rules.nesterov(momentum))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate), kernel)


def local(learning_rate, every, slow_dtype=None):
    inner = nag_jax.nag(learning_rate, 0.5)
    return nag_jax.snoo(inner, momentum=0.5, every=every, slow_dtype=slow_dtype)


def averaged(learning_rate):
    return nag_jax.averaged(nag_jax.nag(learning_rate), power=8.0)


class Case(NamedTuple):
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any]
    static: tuple[str, ...] = ()  # arguments that inject_hyperparams must leave alone
    copies_params: bool = False  # into its state, which so needs their values
    evaluates: bool = False  # calls the loss itself, so it must see all of params
    copies: bool = False  # a copy of its buffer: the old one is needed after it is written
    rounding: float = 1e-6  # how far two compilations may differ

    def make(self, **kwargs):
        return self.factory(**(self.kwargs | kwargs))


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
    "snoo": Case(local, dict(learning_rate=0.05, every=3), ("every",), copies_params=True),
    "snoo float32 copy": Case(
        local,
        dict(learning_rate=HALVING, every=3, slow_dtype=jnp.float32),
        ("every", "slow_dtype"),
        copies_params=True,
    ),
    "nag_auto": Case(nag_jax.nag_auto, dict(learning_rate=1.0)),
    "nag_auto scheduled": Case(nag_jax.nag_auto, dict(learning_rate=HALVING, evaluate="iterate")),
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
    "averaged": Case(averaged, dict(learning_rate=0.1)),
    "clipped": Case(clipped, dict(learning_rate=0.05, momentum=0.5)),
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
# There a link of optax that takes arrays only is what the gradient meets first.
ARRAYS_ONLY = ("clipped",)
pytestmark = pytest.mark.filterwarnings("ignore:momentum 0.98 in a")  # FISTA's, in bfloat16
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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


def run(optimizer, params, step=None):
    state, step = optimizer.init(params), step or jax.jit(step_of(optimizer))
    for _ in range(12):
        params, state = step(params, state)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_minimizes(case, dtype):
    conjugate = lambda params: jax.tree.map(jnp.conj, jax.grad(loss)(params))
    optimizer = case.make()
    params, step = example_params(dtype), jax.jit(step_of(optimizer, conjugate))
    state, before = optimizer.init(params), loss(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(nag_jax.eval_params(params, state)) < 0.02 * before


@every_case
@pytest.mark.parametrize(
    ("params_dtype", "gradient_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
     ("float32", "bfloat16"), ("float16", "float16"), ("complex64", "complex64")],
)  # fmt: skip
def test_state_and_update_types_are_stable(case, params_dtype, gradient_dtype):
    optimizer = case.make()
    params = example_params(params_dtype)
    gradients = jax.tree.map(lambda p: jnp.ones_like(p, gradient_dtype), params)
    extra = known(params)
    update = lambda state: optimizer.update(gradients, state, params, **extra)
    state = jax.eval_shape(optimizer.init, params)  # types are known without compiling
    updates, new_state = jax.eval_shape(update, state)
    assert types(new_state) == types(state)
    if "decay" not in str(case.kwargs):  # optax adds float32 params to bfloat16 gradients there
        chex.assert_trees_all_equal_dtypes(updates, gradients)
    scan = lambda state: jax.lax.scan(lambda s, _: (update(s)[1], None), state, length=3)
    jax.eval_shape(scan, state)
    jax.eval_shape(lambda s: jax.lax.cond(True, lambda s: update(s)[1], lambda s: s, s), state)


@every_case
def test_compiles_once(case):
    optimizer, params = case.make(), example_params()
    state = optimizer.init(params)
    step = jax.jit(chex.assert_max_traces(step_of(optimizer), n=1))
    for _ in range(5):
        params, state = step(params, state)


@pytest.mark.slow
@every_case
def test_scan_vmap_and_eager_agree_with_a_jitted_loop(case):
    optimizer, params = case.make(), example_params()
    step = step_of(optimizer)
    jitted = jax.jit(step)
    expected, _ = run(optimizer, params, jitted)
    scanned, _ = jax.jit(
        lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, length=12)[0]
    )((params, optimizer.init(params)))
    close = functools.partial(chex.assert_trees_all_close, rtol=case.rounding, atol=case.rounding)
    close(scanned, expected)
    eager, state = params, optimizer.init(params)
    for _ in range(12):
        eager, state = step(eager, state)
    close(eager, expected)
    batched = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    carry, batched_step = (batched, jax.vmap(optimizer.init)(batched)), jax.jit(jax.vmap(step))
    for _ in range(12):
        carry = batched_step(*carry)
    double, _ = run(optimizer, jax.tree.map(lambda p: 2 * p, params), jitted)
    row = lambda i: jax.tree.map(lambda p: p[i], carry[0])
    close((row(0), row(1)), (expected, double))


@every_case
def test_inject_hyperparams_gives_the_same_numbers(case):
    if case.kwargs.get("convention") == "sutskever" and callable(case.kwargs.get("momentum")):
        case = case._replace(kwargs=case.kwargs | {"momentum": 0.9})  # see test_rules.py
    params = example_params()
    expected, expected_state = run(case.make(), params)
    injected = optax.inject_hyperparams(case.factory, static_args=case.static)(**case.kwargs)
    actual, state = run(injected, params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        nag_jax.eval_params(actual, state),
        nag_jax.eval_params(expected, expected_state),
        rtol=1e-5,
        atol=1e-6,
    )


@every_case
def test_learning_rate_set_in_the_state_is_used_without_retracing(case):
    if callable(case.kwargs.get("learning_rate", callable)):
        return  # there is none, or optax computes a scheduled hyperparameter anew at each step
    params = example_params()
    inject = optax.inject_hyperparams(case.factory, static_args=case.static)
    optimizer = inject(**case.kwargs)
    step = jax.jit(chex.assert_max_traces(step_of(optimizer), n=1))
    slow_params, state = step(params, optimizer.init(params))
    faster = state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.float32(0.02)})
    moved = lambda state: loss(step(slow_params, state)[0])
    assert moved(faster) != moved(state)


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
def test_donates_cleanly(case):  # warnings are errors: an unusable donation fails
    optimizer = case.make()
    params = jax.tree.map(jnp.array, example_params())
    state = optimizer.init(params)
    step = jax.jit(step_of(optimizer), donate_argnums=(0, 1))
    for _ in range(3):
        old, old_state = params, state
        params, state = step(params, state)
    donated = [x.is_deleted() for x in jax.tree.leaves((old, old_state.inner_state if hasattr(
        old_state, "inner_state") else old_state)) if x.size > 1]  # fmt: skip
    assert donated
    assert all(donated)


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
    params = example_params()
    masked = optax.masked(case.make(), {"layers": True, "scale": False, "empty": True})
    frozen = optax.chain(optax.masked(optax.set_to_zero(), {
        "layers": False, "scale": True, "empty": False}), masked)  # fmt: skip
    after, state = run(frozen, params)
    assert after["scale"] == params["scale"]
    assert nag_jax.eval_params(after, state)["scale"] == params["scale"]
    only_layers = optax.masked(optax.set_to_zero(), {"layers": False, "scale": True, "empty": True})
    expected, _ = run(optax.chain(only_layers, case.make()), params)
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
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = case.make()
    squares = lambda p: jnp.sum(eqx.combine(p, static)(jnp.ones(2)) ** 2)
    gradients, extra = jax.grad(squares)(params), known(params, squares)
    updates, state = optimizer.update(gradients, optimizer.init(params), params, **extra)
    trained = eqx.apply_updates(params, updates)
    assert jax.tree.structure(nag_jax.eval_params(trained, state)) == jax.tree.structure(params)
    frozen = eqx.tree_at(lambda g: g.layers[0].bias, gradients, None)
    updates, new_state = optimizer.update(frozen, state, params, **extra)
    assert updates.layers[0].bias is None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def zero1():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return nag_jax.zero1(nag_jax.nag(0.1), mesh)


def size(tree):
    """The square of it, as far as it can be trained."""
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(jnp.sum(x**2) for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))


# Every other one that has leaves of params to train.
OTHERS = {
    "accelerate": lambda: nag_jax.accelerate(rules.nesterov(0.5)),
    "prox_step": lambda: nag_jax.proximal.prox_step(nag_jax.proximal.l1(0.1), 0.1),
    "monotone_fista": lambda: nag_jax.monotone_fista(size),
    "ogm": lambda: nag_jax.ogm(0.1),
    "tmm": lambda: nag_jax.tmm(0.1, q=0.1),
    "averaged descent": lambda: nag_jax.averaged(optax.sgd(0.1)),
    "lookahead": lambda: nag_jax.lookahead(optax.sgd(0.1), every=2),
    "diloco": lambda: nag_jax.diloco(optax.sgd(0.1), "workers", every=2),
    "stochastic_rounding": lambda: nag_jax.stochastic_rounding(),
    "zero1": zero1,
}
EVERY = {name: case.make for name, case in CASES.items()} | OTHERS
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


# Gives diloco the axis that it needs.
of_one_worker = functools.partial(
    jax.vmap, in_axes=None, out_axes=None, axis_size=1, axis_name="workers"
)


@functools.cache
def partly_frozen(name):
    """The optimizer, params with a leaf that has no gradient, and a compiled step."""
    params = {"frozen": jnp.linspace(1.0, 2.0, 3), "free": jnp.ones(3), "none": None}
    optimizer = EVERY[name]()
    update = optax.with_extra_args_support(optimizer).update

    @of_one_worker
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
        return str(jax.make_jaxpr(of_one_worker(update))(gradients, state))

    assert program(model) == program(params)
