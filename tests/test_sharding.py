"""State split over devices: 1/N of the bytes, the numbers of one device, for every optimizer."""

import copy
import pickle
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import CASES

import nag_jax
from nag_jax import proximal, restart, rules, schedules

KINDS = (AxisType.Auto, AxisType.Explicit)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
NAG = nag_jax.nag(0.05, 0.9)


def mesh_of(devices=8, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), (kind,), devices=jax.devices()[:devices])


def start():
    w = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 3
    return {"w": w(0, 16, 64), "narrow": w(1, 5, 16), "b": jnp.zeros(64), "scale": jnp.ones([])}


def batch_of(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    return {"x": x, "y": x.sum(1), "scale": np.linspace(0.1, 2, rows, dtype=np.float32)}


BATCH = batch_of(32)


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["narrow"] @ params["w"] + params["b"][None])
    error = params["scale"] * jnp.mean(hidden, axis=1) - batch["y"]
    return jnp.mean(batch["scale"] * error**2)


def alone(optimizer, steps=15):
    """The plain loop on one device."""

    @jax.jit
    def step(params, state):
        value_fn = lambda p: loss(p, BATCH)
        value, gradient = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    params = start()
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def run(step, params, steps=15):
    state = step.init(params)
    lies = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(steps):
        params, state, _ = step(params, state, BATCH)
    step.check(state)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(lies), strict=True):
        whole = x.sharding.is_fully_replicated and sharding.is_fully_replicated  # pmap of jax 0.7
        assert whole or x.sharding.is_equivalent_to(sharding, x.ndim)
    return params, state


def split_params(mesh):
    """As for FSDP: what can be split is."""
    specs = {"w": P("data"), "narrow": P(None, "data"), "b": P("data"), "scale": P()}
    return {key: jax.device_put(p, NamedSharding(mesh, specs[key])) for key, p in start().items()}


class Needy(NamedTuple):
    """An optimizer outside the contract test, since it needs the value or the objective."""

    optimizer: optax.GradientTransformationExtraArgs

    def make(self):
        return self.optimizer


def monotone():
    head = proximal.prox_step(proximal.l1(1e-3), 0.2)
    penalty = lambda p: 1e-3 * sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))
    return optax.chain(head, nag_jax.monotone_fista(lambda p: loss(p, BATCH) + penalty(p)))


def after_sgd(rule, condition=None):
    return optax.chain(optax.sgd(0.1), nag_jax.accelerate(rule, condition))


MORE = {
    "ogm": Needy(nag_jax.ogm(0.1)),
    "tmm": Needy(nag_jax.tmm(0.1, 0.01)),
    "backtracking": Needy(nag_jax.backtracking()),
    "backtracking prox": Needy(nag_jax.backtracking(proximal.l1(1e-3), restart="value")),
    "monotone_fista prox": Needy(monotone()),
    "restart value": Needy(after_sgd(rules.fista(), restart.value)),
    "restart often": Needy(after_sgd(rules.nesterov(0.99), restart.gradient)),
    "group prox": Needy(
        nag_jax.fista(0.1, lambda p, step: p | {"w": proximal.group_l1(1e-3)(p["w"], step)})
    ),
    "qhm": Needy(after_sgd(rules.qhm(0.7, 0.9))),
    "srsgd": Needy(after_sgd(rules.srsgd(4))),
    "ema_nesterov": Needy(after_sgd(rules.ema_nesterov(0.9, lambda k: jnp.where(k < 9, 0.5, 0)))),
    "zero_nans and norm": Needy(optax.chain(optax.zero_nans(), optax.clip(0.1), NAG)),
    "adam accelerated": Needy(
        optax.chain(optax.adam(0.01), nag_jax.accelerate(rules.nesterov(0.5)))
    ),
}


# diloco is in test_local.py, MORE has monotone_fista with the objective of this file, and zero1 is
# tested with every optimizer. With float32 params stochastic_rounding does nothing.
OTHERS = {"diloco", "monotone_fista", "stochastic_rounding", "zero1"}
CASES_HERE = {name: case for name, case in CASES.items() if name not in OTHERS} | MORE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_HERE.values(), ids=CASES_HERE)
def test_every_optimizer_is_right_on_many_devices(case):
    """A later optimizer joins by being in CASES; one that needs more than gradients in MORE.

    Steps are compared before rounding can turn a restart or a search another way.
    """
    optimizer, mesh = case.make(), mesh_of()
    expected, expected_state = alone(optimizer)
    ways = {  # and into how many parts buffers are split
        "zero1": (nag_jax.zero1(optimizer, mesh, min_size=64), "shard_map", start(), 8),
        "fsdp": (optimizer, "jit", split_params(mesh), 8),
        "pmap": (optimizer, "pmap", start(), 1),
    }
    for name, (sharded, mode, params, parts) in ways.items():
        rows = params["w"].addressable_shards[0].data.shape
        actual, state = run(nag_jax.train_step(loss, sharded, mesh=mesh, mode=mode), params)
        if any(x.dtype == jnp.int8 for x in jax.tree.leaves(expected_state)):
            _assert_few_flips(actual, expected)
        else:
            chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert _integers(state.opt_state) == _integers(expected_state), name
        buffers = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 64)]
        assert {x.addressable_shards[0].data.shape for x in buffers} == {(16 // parts, 64)}, name
        assert actual["w"].addressable_shards[0].data.shape == rows, name
        assert nag_jax.replicas_in_sync((actual, state)), name


LOOKED_AHEAD = {
    "sgd": lambda lr: optax.sgd(lr, 0.5),
    "adamw": lambda lr: optax.adamw(lr, weight_decay=0.01),
    "muon": lambda lr: optax.contrib.muon(lr, weight_decay=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKED_AHEAD)
def test_ema_nesterov_is_split_and_resumes(name):
    """Around any optimizer, saved inside of the window of its look-ahead."""
    rate = optax.cosine_decay_schedule(0.02, 30)
    ahead = schedules.follow_learning_rate(0.6, rate, start=3, end=12)
    kernel = nag_jax.accelerate(rules.ema_nesterov(0.9, ahead))
    optimizer = optax.chain(LOOKED_AHEAD[name](rate), kernel)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    def trained(carry, steps):
        for _ in range(steps):
            carry = step(*carry)
        return carry

    params = split_params(mesh_of())
    halfway = trained((params, optimizer.init(params)), 7)
    assert not np.array_equal(halfway[0]["w"], nag_jax.eval_params(*halfway)["w"])
    saved = serialization.to_bytes(halfway)
    fresh = trained((params, optimizer.init(params)), 1)  # compiled state lies as that one does
    restored = serialization.from_bytes(fresh, saved)
    restored = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), restored, fresh)
    finished = trained(halfway, 8)
    chex.assert_trees_all_equal(trained(restored, 8), finished)
    chex.assert_trees_all_close(finished[0], alone(optimizer)[0], rtol=1e-3, atol=1e-4)
    assert finished[1][1].m["w"].addressable_shards[0].data.shape == (2, 64)


def _assert_few_flips(actual, expected):
    """Gradients summed in another order may round a few int8 numbers to the other neighbour."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        off = jnp.abs(a - b)
        assert jnp.mean(off > 1e-5 + 1e-4 * jnp.abs(b)) < 0.005
        assert jnp.max(off, initial=0) < 1e-3


def _integers(tree):
    """Counts of steps, restarts and retries, and whatever else shows that decisions agree."""
    counts = lambda x: jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != jnp.int8  # a buffer
    return [x.tolist() for x in jax.tree.leaves(tree) if counts(x)]


def test_restarts_and_retries_do_happen_there():
    for name, field in (("restart often", "restarts"), ("backtracking", "restarts")):
        state = alone(MORE[name].make())[1]
        assert optax.tree.get(state, field) > 0, name


def bytes_of(tree, device):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


@every_kind
@pytest.mark.parametrize("devices", [2, 8])
def test_each_device_keeps_its_part_of_the_state(devices, kind):
    mesh = mesh_of(devices, kind)
    optimizer = nag_jax.zero1(NAG, mesh)
    params = start()
    state = optimizer.init(params)
    whole = {x.shape: x.nbytes for x in jax.tree.leaves(NAG.init(params))}
    small = sum(n for shape, n in whole.items() if np.prod(shape) < 1024)
    small += 4 * (len(jax.tree.leaves(state)) - len(whole))  # scalars of the same shape
    for device in mesh.devices.flat:
        assert bytes_of(state, device) == whole[16, 64] / devices + small


LAYOUTS = {  # axes of the mesh; the spec of each parameter, and the shape of a device's momentum
    "columns": (dict(data=2, model=4), {
        "w": (P(None, "model"), (8, 16)),
        "narrow": (P(None, "model"), (5, 2)),
        "b": (P("model"), (8,)),
        "scale": (P(), ()),
    }),
    "rows": (dict(data=2, model=4), {
        "w": (P("model"), (4, 32)),
        "narrow": (P(), (5, 8)),
        "b": (P(), (32,)),
        "scale": (P(), ()),
    }),
    "fsdp and columns": (dict(data=2, model=4), {
        "w": (P("data", "model"), (8, 16)),
        "narrow": (P(None, ("model", "data")), (5, 2)),
        "b": (P("model"), (8,)),
        "scale": (P(), ()),
    }),
    "three axes": (dict(data=2, fsdp=2, model=2), {
        "w": (P("fsdp", "model"), (4, 32)),
        "narrow": (P(None, "model"), (5, 4)),
        "b": (P(("fsdp", "model")), (8,)),
        "scale": (P(), ()),
    }),
    "some that do not divide": (dict(data=4, model=2), {
        "w": (P("model"), (8, 16)),
        "odd": (P(None, "model"), (3, 1)),
        "inside": {"w": (P(), (4, 64))},  # whole, unlike its namesake
    }),
}  # fmt: skip


def laid(name, kind):
    """The mesh, parameters on it, and the shape of a device's momentum of each."""
    axes, table = LAYOUTS[name]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes))
    known = start() | {"odd": jnp.ones((3, 2)), "inside": {"w": start()["w"]}}
    is_row = lambda node: isinstance(node, tuple)
    params = jax.tree.map(
        lambda row, p: jax.device_put(p, NamedSharding(mesh, row[0])),
        table,
        {key: known[key] for key in table},
        is_leaf=is_row,
    )
    return mesh, params, [shape for _, shape in jax.tree.leaves(table, is_leaf=is_row)]


def shards_of(tree):
    return [{s.data.shape for s in x.addressable_shards} for x in jax.tree.leaves(tree)]


@every_kind
@pytest.mark.parametrize("name", LAYOUTS)
def test_state_of_split_parameters_is_split_further(name, kind):
    mesh, params, shapes = laid(name, kind)
    momentum = optax.tree.get(nag_jax.zero1(NAG, mesh, min_size=1).init(params), "m")
    assert shards_of(momentum) == [{shape} for shape in shapes]
    for device in mesh.devices.flat:
        assert bytes_of(momentum, device) == 4 * sum(int(np.prod(shape)) for shape in shapes)
        assert bytes_of(momentum, device) < bytes_of(params, device)
    momentum = optax.tree.get(nag_jax.zero1(NAG, mesh, min_size=1024).init(params), "m")
    for x, p, shape in zip(*map(jax.tree.leaves, (momentum, params)), shapes, strict=True):
        lies = {shape} if p.size == 1024 else {s.data.shape for s in p.addressable_shards}
        assert {s.data.shape for s in x.addressable_shards} == lies


def gathered(kind, where):
    """The loss of parameters that are split, which Explicit axes want to be told."""
    whole = lambda p: jax.sharding.reshard(p, where) if kind == AxisType.Explicit else p
    return lambda params, batch: loss(jax.tree.map(whole, params), batch)


@every_kind
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("columns", "by hand"),
        ("three axes", "scan"),
        ("fsdp and columns", "jit"),
        ("rows", "shard_map"),
    ],
)
def test_zero1_beside_other_splits_is_right_and_keeps_them(name, way, kind):
    mesh, params, shapes = laid(name, kind)
    inner = optax.chain(optax.clip_by_global_norm(0.05), NAG)
    optimizer = nag_jax.zero1(inner, mesh, min_size=1)
    # Inside shard_map the mesh is that of the context.
    objective = gathered(kind, P() if way == "shard_map" else NamedSharding(mesh, P()))
    before = jax.tree.map(lambda p: p.sharding, params)
    if way in ("by hand", "scan"):
        state = optimizer.init(params)
        batch = jax.device_put(BATCH, NamedSharding(mesh, P()))

        def step(params, state):
            gradient = jax.grad(objective)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        if way == "by hand":
            actual, state = _loop(jax.jit(step), params, state)
        else:
            lies = jax.tree.map(lambda x: x.sharding, (params, state))
            many = lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=15)[0]
            actual, state = jax.jit(many, out_shardings=lies)((params, state))
    else:
        step = nag_jax.train_step(objective, optimizer, mesh=mesh, mode=way)
        actual, state = run(step, params)
    chex.assert_trees_all_close(actual, alone(inner)[0], rtol=0, atol=1e-6)
    assert shards_of(optax.tree.get(state, "m")) == [{shape} for shape in shapes]
    for x, sharding in zip(jax.tree.leaves(actual), jax.tree.leaves(before), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert nag_jax.replicas_in_sync((actual, state))


def test_a_search_beside_other_splits():
    """It calls ``value_fn`` at points of its own, and has more in its state than a buffer."""
    mesh, params, shapes = laid("columns", AxisType.Auto)
    inner = nag_jax.averaged(nag_jax.backtracking())
    step = nag_jax.train_step(loss, nag_jax.zero1(inner, mesh, min_size=1), mesh=mesh)
    lies = shards_of(params)
    actual, state = run(step, params)
    chex.assert_trees_all_close(actual, alone(inner)[0], rtol=1e-4, atol=1e-5)
    assert shards_of(actual) == lies
    buffers = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 64)]
    assert len(buffers) == 2
    assert shards_of(buffers) == [{shapes[-1]}] * 2


def test_split_parameters_in_a_flax_optimizer():
    mesh, params, shapes = laid("columns", AxisType.Auto)
    model = nnx.Dict({key: nnx.Param(p) for key, p in params.items()})
    optimizer = nnx.Optimizer(model, nag_jax.zero1(NAG, mesh, min_size=1), wrt=nnx.Param)
    lies = shards_of(nnx.state(model))

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda model: loss({key: model[key][...] for key in params}, BATCH))
        optimizer.update(model, gradient(model))

    for _ in range(15):
        step(model, optimizer)
    trained = {key: model[key][...] for key in params}
    chex.assert_trees_all_close(trained, alone(NAG)[0], rtol=0, atol=1e-6)
    assert shards_of(nnx.state(model)) == lies
    momentum = optax.tree.get(optimizer.opt_state, "m")
    assert shards_of(momentum) == [{shape} for shape in shapes]


def test_a_layout_survives_copies():
    mesh, params, _ = laid("columns", AxisType.Auto)
    state = nag_jax.zero1(NAG, mesh).init(params)
    for same in (copy.deepcopy(state.layout), pickle.loads(pickle.dumps(state.layout))):
        assert same == state.layout
        assert hash(same) == hash(state.layout)
    assert nag_jax.zero1(NAG, mesh).init(start()).layout == ()


@every_kind
def test_init_never_makes_the_state_whole(kind):
    """By the compiled program: no buffer of it, temporary or not, has the whole shape."""
    optimizer = nag_jax.zero1(NAG, mesh_of(kind=kind))
    seen = []
    params = {"w": jax.device_put(jnp.ones((1024, 256)), NamedSharding(mesh_of(kind=kind), P()))}
    original = jax.jit

    def recorded(function, **options):
        compiled = programs.compiled(original(function, **options).lower(params))
        seen.append(compiled)
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", recorded)
        state = optimizer.init(params)
    (program,) = seen
    assert "1024,256" not in program.as_text()
    memory = program.memory_analysis()
    whole = 4 * 1024 * 256
    used = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert used + memory.argument_size_in_bytes < 1.1 * whole / 8
    assert max(bytes_of(state, d) for d in jax.devices()) < 1.1 * whole / 8


@every_kind
def test_abstract_and_traced_init_split_alike(kind):
    mesh = mesh_of(kind=kind)
    optimizer, params = nag_jax.zero1(NAG, mesh), start()
    state = optimizer.init(params)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):  # which JAX wants for a traced init under Explicit axes
        traced = jax.jit(optimizer.init)(placed)
    for other in (optimizer.init(abstract), traced):
        chex.assert_trees_all_equal(other, state)
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@every_kind
def test_zero1_in_a_loop_of_ones_own_and_in_a_scan(kind):
    """Momentum split without zero1: params come back split (Auto), or scan raises (Explicit)."""
    mesh = mesh_of(kind=kind)
    optimizer = nag_jax.zero1(NAG, mesh)
    whole = NamedSharding(mesh, P())
    batch = jax.device_put(BATCH, whole)
    params = jax.device_put(start(), whole)
    state = optimizer.init(params)

    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    scan = lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, length=15)[0]
    expected, _ = alone(NAG)
    lies = jax.tree.map(lambda x: x.sharding, (params, state))
    scanned = jax.jit(scan, out_shardings=lies)((params, state))
    for actual, after in (scanned, _loop(step, params, state)):
        chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6)
        assert actual["w"].addressable_shards[0].data.shape == (16, 64)
        buffer = optax.tree.get(after, "m")["w"]
        assert buffer.addressable_shards[0].data.shape == (2, 64)


def _loop(step, params, state):
    step = jax.jit(chex.assert_max_traces(step.__wrapped__, n=1))
    for _ in range(15):
        params, state = step(params, state)
    return params, state


@every_kind
@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_zero1_in_train_step(mode, accumulate, kind):
    mesh = mesh_of(kind=kind)
    optimizer = nag_jax.zero1(NAG, mesh)
    step = nag_jax.train_step(loss, optimizer, mesh=mesh, mode=mode, accumulate=accumulate)
    actual, _ = run(step, start())
    chex.assert_trees_all_close(actual, alone(NAG)[0], rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("accumulate", [1, 3])
def test_parameters_split_over_devices(accumulate, kind):
    """FSDP: nothing is whole anywhere for longer than it is used."""
    mesh = mesh_of(kind=kind)

    objective = gathered(kind, NamedSharding(mesh, P()))
    step = nag_jax.train_step(objective, NAG, mesh=mesh, accumulate=accumulate)
    params = split_params(mesh)
    parts = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, params)
    actual, state = run(step, params)
    chex.assert_trees_all_close(actual, alone(NAG)[0], rtol=0, atol=1e-6)
    for tree in (actual, optax.tree.get(state, "m")):
        assert jax.tree.map(lambda x: x.addressable_shards[0].data.shape, tree) == parts
    assert parts["w"] == (2, 64)


def test_modes_with_whole_parameters_refuse_split_ones():
    for mode in ("shard_map", "pmap"):
        step = nag_jax.train_step(loss, NAG, mesh=mesh_of(), mode=mode)
        params = split_params(mesh_of())
        with pytest.raises(ValueError, match="whole along 'data'"):
            step(params, step.init(params), BATCH)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("jitted", [False, True])
def test_zero1_takes_python_numbers(jitted, kind):
    params = {"w": jnp.ones((16, 2)), "scale": 0.5}
    gradients = {"w": jnp.ones((16, 2)), "scale": 0.25}
    arrays = jax.tree.map(jnp.asarray, (gradients, params))
    value = lambda p: jnp.sum(p["w"] ** 2) + p["scale"] ** 2
    for inner in (NAG, nag_jax.nag_auto(), nag_jax.backtracking()):
        results = []
        for g, p in ((gradients, params), arrays):
            optimizer = nag_jax.zero1(inner, mesh_of(kind=kind), min_size=8)
            update = lambda g, state, p, tx=optimizer: tx.update(
                g, state, p, value=value(p), grad=g, value_fn=value
            )
            with jax.set_mesh(mesh_of(kind=kind)):  # which jax 0.7 wants outside of jit
                results.append((jax.jit(update) if jitted else update)(g, optimizer.init(p), p))
        chex.assert_trees_all_equal(*results)
        chex.assert_trees_all_equal_shapes_and_dtypes(*results)


def test_zero1_says_what_is_wrong():
    for mesh, axis in (("cpu", "data"), (mesh_of(), "model")):
        with pytest.raises(ValueError, match="mesh"):
            nag_jax.zero1(NAG, mesh, axis)
    with pytest.raises(ValueError, match=r"optimizer must be an optax\.Gradient"):
        nag_jax.zero1(nag_jax.nag, mesh_of())
    with pytest.raises(ValueError, match="min_size"):
        nag_jax.zero1(NAG, mesh_of(), min_size=0)
    with pytest.raises(ValueError, match=r"is split over devices by .* not of the mesh"):
        nag_jax.zero1(NAG, mesh_of(4)).init(split_params(mesh_of(8)))
    step = nag_jax.train_step(loss, nag_jax.zero1(NAG, mesh_of()), mode="pmap")
    with pytest.raises(ValueError, match="zero1 was called inside pmap"):
        run(step, start())


def test_eval_params_of_split_state():
    optimizer = nag_jax.zero1(NAG, mesh_of())
    step = nag_jax.train_step(loss, optimizer, mesh=mesh_of())
    params, state = run(step, start())
    expected = nag_jax.eval_params(*alone(NAG))
    chex.assert_trees_all_close(nag_jax.eval_params(params, state), expected, atol=1e-6)


def unequal(spec, axes=("data",), shape=(8,)):
    """An array whose copies differ by device, as a forgotten pmean leaves them."""
    mesh = jax.make_mesh(shape, axes, (AxisType.Auto,) * len(axes))
    add = lambda x: x + jax.lax.axis_index("data")
    return jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
        jnp.zeros((8, 4))
    )


def test_replicas_in_sync():
    mesh = mesh_of()
    equal = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P()))
    parts = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    assert nag_jax.replicas_in_sync({"a": equal, "b": parts, "c": 3, "d": None})
    assert nag_jax.replicas_in_sync(jax.device_put(jax.random.key(0), NamedSharding(mesh, P())))
    assert nag_jax.replicas_in_sync(jax.device_put(jnp.full(8, jnp.nan), NamedSharding(mesh, P())))
    assert not nag_jax.replicas_in_sync((equal, unequal(P())))
    assert nag_jax.replicas_in_sync(unequal(P("data")))
    two = dict(axes=("data", "model"), shape=(4, 2))
    assert not nag_jax.replicas_in_sync(unequal(P("model"), **two))
    assert nag_jax.replicas_in_sync(unequal(P("data"), **two))


def test_replicas_in_sync_refuses_what_is_traced():
    for transform in (jax.jit, jax.vmap, jax.pmap):
        with pytest.raises(ValueError, match=r"arrays on devices, got .* for \['w'\]; call it out"):
            transform(nag_jax.replicas_in_sync)({"w": jnp.ones((1, 3))})


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_zero1_moves_a_gradient_and_an_update(mode, accumulate, clip):
    """In the compiled program: gradients reduced once, then a few numbers, updates gathered."""
    mesh, params = mesh_of(), start()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), NAG) if clip else NAG
    step = nag_jax.train_step(
        loss, nag_jax.zero1(optimizer, mesh), mesh=mesh, mode=mode, accumulate=accumulate
    )
    lowered = step.lower(params, step.init(params), batch_of(32))
    found = programs.collectives(programs.compiled(lowered).as_text())
    total, large = sum(p.size for p in jax.tree.leaves(params)), 16 * 64
    assert found.pop("all-gather") == [large]
    # XLA has no pass for CPUs that makes a reduce-scatter of an all-reduce and a slice.
    explicit = mode == "shard_map" or accumulate > 1
    if explicit:
        assert found.pop("reduce-scatter") == [large // 8]
    *few, gradient = sorted(found.pop("all-reduce"))
    assert len(few) == 2 + clip
    assert all(size <= len(params) for size in few)
    assert 0 <= gradient - total + explicit * large <= 2  # loss and weight
    assert not found
