"""One step over devices: the same numbers in every mode, one all-reduce, no update from a NaN."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nag_jax

MODES = ("jit", "shard_map", "pmap")
every_mode = pytest.mark.parametrize("mode", MODES)


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), (kind,), devices=jax.devices()[:devices])


def start():
    w = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 3
    return {"w": w(0, 3, 8), "b": jnp.zeros(8), "out": w(1, 8)}


def batch_of(rows):
    """Later rows have larger losses, so that no shard stands for another."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1) + 1, "scale": np.linspace(0.1, 2, rows, dtype=np.float32)}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return jnp.mean(batch["scale"] * (hidden @ params["out"] - batch["y"]) ** 2)


def alone(optimizer, params, batches, loss=loss):
    """The plain loop on one device, each batch as a whole."""

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params


def run(step, params, batches, **given):
    state = step.init(params, **given)
    for batch in batches:
        params, state, metrics = step(params, state, batch)
    step.check(state)
    return params, state, metrics


def text_of(step, *arguments):
    return programs.compiled(step.lower(*arguments)).as_text()


NAG = nag_jax.nag(0.01, 0.9)  # far from where rounding would grow


@pytest.fixture(scope="module")
def expected():
    batches = [batch_of(29)] * 100
    return batches, alone(NAG, start(), batches)


PLACES = [(1, 1), (2, 1), (4, 1), (8, 1), (8, 3)]


@every_mode
@pytest.mark.parametrize(("devices", "accumulate"), PLACES)
def test_a_hundred_steps_equal_those_of_one_device(mode, devices, accumulate, expected):
    """29 rows divide by none of 2, 4, 8 and 24."""
    batches, params = expected
    mesh = mesh_of(devices)
    step = nag_jax.train_step(loss, NAG, mesh=mesh, mode=mode, accumulate=accumulate)
    actual, state, metrics = run(step, start(), batches)
    chex.assert_trees_all_close(actual, params, rtol=0, atol=1e-6)
    assert state.steps == 100
    assert state.skipped == metrics["skipped"] == 0
    assert nag_jax.replicas_in_sync((actual, state))
    for x in jax.tree.leaves(actual):
        assert x.sharding.is_fully_replicated
        assert x.sharding.device_set == set(mesh.devices.flat)


@every_mode
def test_metrics_are_those_of_the_whole_batch(mode):
    step = nag_jax.train_step(
        lambda p, b: (loss(p, b), {"mean": jnp.mean(b["y"])}), NAG, mode=mode, has_aux=True
    )
    batch, params = batch_of(5), start()  # fewer rows than devices
    norm = optax.tree.norm(jax.grad(loss)(params, batch))
    value = loss(params, batch)
    _, _, metrics = run(step, params, [batch])
    actual = metrics["loss"], metrics["grad_norm"], metrics["aux"]["mean"]
    chex.assert_trees_all_close(actual, (value, norm, batch["y"].mean()), rtol=1e-5)


@every_mode
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sums_are_exact(mode, accumulate):
    """Of counts whose mean is rounded."""
    right = lambda p, b: (loss(p, b), jnp.sum(b["y"] > 0))
    step = nag_jax.train_step(right, NAG, mode=mode, accumulate=accumulate, has_aux=True, aux="sum")
    for rows in (64, 67):  # of 67 each device computes the last 3
        batch = batch_of(rows)
        _, _, metrics = run(step, start(), [batch])
        assert metrics["aux"] == np.sum(batch["y"] > 0)


@pytest.mark.parametrize("split", [False, True])
def test_micro_batches_are_the_same_on_any_number_of_devices(split):
    """A loss that depends on which rows are together, as BatchNorm does."""
    together = lambda p, b: jax.lax.pmean(jnp.mean(b["x"] @ p), "data") ** 2
    alone = lambda p, b: jnp.mean(b["x"] @ p) ** 2
    params, batch = np.ones((3, 8), np.float32), {"x": batch_of(64)["x"]}
    found = []
    for devices in (1, 4):
        mesh = mesh_of(devices)
        spec = P(None, "data") if split else P()
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        objective = alone if split else together
        step = nag_jax.train_step(objective, optax.sgd(0.1), mesh=mesh, accumulate=4)
        found.append(run(step, placed, [batch])[0])
    chex.assert_trees_all_close(*map(np.asarray, found), rtol=1e-6)


@every_mode
@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_all_reduce_per_update(mode, accumulate):
    def loss_and_more(params, batch, model_state):
        return loss(params, batch), (model_state * 0.9 + jnp.mean(batch["x"], 0), batch["y"].mean())

    step = nag_jax.train_step(loss_and_more, NAG, mode=mode, accumulate=accumulate, has_aux=True)
    params = start()
    state = step.init(params, model_state=jnp.zeros(3))
    text = text_of(step, params, state, batch_of(64))
    found = programs.collectives(text)
    assert set(found) == {"all-reduce"}
    assert not programs.collectives(programs.in_loops(text))
    assert bool(programs.in_loops(text)) == (accumulate > 1)
    (size,) = found["all-reduce"]
    gradient, mean_of_x = sum(p.size for p in jax.tree.leaves(params)), 3
    assert gradient + mean_of_x < size <= gradient + mean_of_x + 3  # and weight, loss, aux


@pytest.mark.parametrize(("mode", "accumulate"), [("jit", 1), ("jit", 2), ("shard_map", 2)])
def test_the_program_of_abstract_arrays_is_that_of_arrays(mode, accumulate):
    step = nag_jax.train_step(loss, NAG, mode=mode, accumulate=accumulate)
    params, batch = start(), batch_of(64)
    abstract = jax.eval_shape(lambda *trees: trees, params, step.init(params), batch)
    expected = step.lower(params, step.init(params), batch).as_text()
    assert step.lower(*abstract).as_text() == expected


def test_an_abstract_split_of_parameters_is_that_of_arrays():
    mesh = mesh_of(8)
    params = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, P("data")))
    step = nag_jax.train_step(lambda p, x: jnp.mean((x @ p) ** 2), NAG, mesh=mesh)
    state, batch = step.init(params), jnp.ones((16, 64))
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    abstract = jax.tree.map(shaped, (params, state, batch))
    assert step.lower(*abstract).as_text() == step.lower(params, state, batch).as_text()


def test_abstract_arrays_that_cannot_be_lowered():
    abstract = lambda rows: jax.eval_shape(lambda *trees: trees, start(), state, batch_of(rows))
    for mode, rows, message in (("shard_map", 61, "divide evenly"), ("pmap", 64, "needs arrays")):
        step = nag_jax.train_step(loss, NAG, mode=mode)
        state = step.init(start())
        with pytest.raises(ValueError, match=message):
            step.lower(*abstract(rows))


def test_an_all_reduce_for_each_micro_batch_is_seen():
    def summed(params, batch):
        def add(total, piece):
            gradient = jax.grad(loss)(params, piece)
            return jax.tree.map(jnp.add, total, jax.lax.psum(gradient, "data")), None

        pieces = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
        return jax.lax.scan(add, params, pieces)[0]

    mapped = jax.shard_map(
        summed, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    text = text_of(jax.jit(mapped), start(), batch_of(64))
    assert programs.collectives(programs.in_loops(text)) == programs.collectives(text) != {}


@every_mode
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accumulates_in_float32_and_returns_the_dtype_of_params(mode, accumulate):
    """In bfloat16 64 + 0.125 is 64: a sum there would lose the small rows."""
    linear = lambda p, b: jnp.mean(b * p)
    step = nag_jax.train_step(linear, optax.sgd(1.0), mode=mode, accumulate=accumulate)
    batch = np.full(32, 0.125, np.float32)
    batch[:2] = 64.0
    params, _, _ = run(step, jnp.zeros([], jnp.bfloat16), [batch])
    assert params.dtype == jnp.bfloat16
    assert params == jnp.bfloat16(-batch.mean())


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_on_one_device_is_an_update_of_none(mode, policy, accumulate):
    step = nag_jax.train_step(loss, NAG, mode=mode, accumulate=accumulate, nonfinite=policy)
    good, bad = batch_of(32), batch_of(32)
    bad["x"][13, 1] = np.nan
    before, state, _ = run(step, start(), [good] * 3)
    buffers = jax.tree.map(np.array, state.opt_state)
    kept = jax.tree.map(np.array, before)
    params, state, metrics = step(before, state, bad)
    assert nag_jax.replicas_in_sync((params, state))
    chex.assert_trees_all_equal((params, state.opt_state), (kept, buffers))
    assert np.isnan(metrics["loss"])
    assert (state.steps, state.skipped, state.in_a_row) == (4, 1, 1)
    if policy == "skip":
        after, state, metrics = step(params, state, good)
        step.check(state)
        assert (state.steps, state.skipped, state.in_a_row) == (5, 1, 0)
        chex.assert_trees_all_close(after, alone(NAG, start(), [good] * 4), rtol=0, atol=1e-6)
        return
    calls = 0
    with pytest.raises(FloatingPointError, match="step 3 "):  # noqa: PT012
        for _ in range(20):
            params, state, _ = step(params, state, good)
            calls += 1
    assert calls == 7  # the eighth looks at what came of the bad batch
    chex.assert_trees_all_equal(params, kept)
    with pytest.raises(FloatingPointError, match=r"step 3 .* step\.resume\(state\)"):
        step.check(state)
    after, state, _ = step(params, step.resume(state), good)
    step.check(state)
    assert (state.steps, state.in_a_row) == (12, 0)
    chex.assert_trees_all_close(after, alone(NAG, start(), [good] * 4), rtol=0, atol=1e-6)


@every_mode
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pieces_count_by_their_weight(mode, accumulate):
    """Padded tokens: a mean of means would give short sequences too much."""

    def masked(params, batch, least=0.0):
        errors = (batch["x"] @ params - 1) ** 2
        return jnp.sum(errors * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), least)

    fast = nag_jax.nag(0.05, 0.9)
    batch = {"x": batch_of(32)["x"], "mask": np.ones(32, np.float32)}
    batch["mask"][[0, 1, 2, 5]] = 0
    batch["mask"][20:] = 0  # whole devices without samples
    step = nag_jax.train_step(
        masked, fast, mode=mode, accumulate=accumulate, weight=lambda b: b["mask"].sum()
    )
    params, _, _ = run(step, jnp.zeros(3), [batch] * 5)
    expected = alone(fast, jnp.zeros(3), [batch] * 5, masked)
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-6)
    if (mode, accumulate) != ("jit", 1):
        unweighted = nag_jax.train_step(
            functools.partial(masked, least=1e-9), fast, mode=mode, accumulate=accumulate
        )
        wrong, _, _ = run(unweighted, jnp.zeros(3), [batch] * 5)
        assert np.abs(wrong - expected).max() > 1e-2


def test_resuming_forgets_what_was_not_raised_yet():
    step = nag_jax.train_step(lambda p, b: jnp.mean(b) * p, optax.sgd(1.0))
    params = jnp.zeros([])
    state = step.init(params)
    for rows in [np.full(8, np.inf, np.float32)] * 3:
        params, state, _ = step(params, state, rows)
    state = step.resume(state)
    for _ in range(20):
        params, state, _ = step(params, state, np.ones(8, np.float32))
    step.check(state)
    assert (params, state.skipped) == (-20, 3)
    traced = jax.jit(step.resume)(state._replace(in_a_row=jnp.asarray(5)))
    assert traced.in_a_row == 0


def test_counts_stay_at_the_largest_integer():
    most = np.int32(2**31 - 1)
    step = nag_jax.train_step(lambda p, b: jnp.mean(b) * p, optax.sgd(1.0), nonfinite="skip")
    params = jnp.zeros([])
    state = step.init(params)._replace(steps=most, skipped=most, in_a_row=most)
    for value in (np.nan, np.nan):
        params, state, metrics = step(params, state, np.full(8, value, np.float32))
        assert state.steps == state.skipped == state.in_a_row == metrics["skipped"] == most
    params, state, _ = step(params, state, np.ones(8, np.float32))
    assert (params, state.steps, state.skipped, state.in_a_row) == (-1, most, most, 0)


def test_the_norm_of_a_float16_gradient_does_not_overflow():
    step = nag_jax.train_step(lambda p, b: 300 * jnp.sum(p) * jnp.mean(b), optax.sgd(1e-3))
    params, state, metrics = run(step, jnp.zeros(4, jnp.float16), [np.ones(8, np.float16)])
    assert params.dtype == jnp.float16
    assert metrics["grad_norm"] == 600
    assert state.skipped == 0


def normalized(axis):
    """A loss with BatchNorm over all devices of ``axis``, and its running mean."""
    mean = lambda x: x if axis is None else jax.lax.pmean(x, axis)

    def loss(params, batch, model_state):
        hidden = batch["x"] @ params["w"]
        centre = mean(jnp.mean(hidden, 0))
        variance = mean(jnp.mean((hidden - centre[None]) ** 2, 0))
        hidden = jnp.tanh((hidden - centre[None]) / jnp.sqrt(variance + 1e-5)[None])
        state = {
            "mean": 0.9 * model_state["mean"] + 0.1 * centre,
            "seen": model_state["seen"] + 1,
        }
        error = hidden @ params["out"] - batch["y"]
        return jnp.mean(batch["scale"] * error**2), state

    return loss


def test_batch_norm_over_devices_is_that_of_the_whole_batch():
    given = lambda: {"mean": jnp.zeros(8), "seen": jnp.zeros([], jnp.int32)}
    batches = [batch_of(32)] * 10
    runs = {
        mode: run(
            nag_jax.train_step(normalized(axis), NAG, mode=mode),
            {key: start()[key] for key in ("w", "out")},
            batches,
            model_state=given(),
        )
        for mode, axis in (("jit", None), ("shard_map", "data"), ("pmap", "data"))
    }
    one = run(
        nag_jax.train_step(normalized(None), NAG, mesh=mesh_of(1)),
        {key: start()[key] for key in ("w", "out")},
        batches,
        model_state=given(),
    )
    for params, state, _ in runs.values():
        chex.assert_trees_all_close(
            (params, state.model_state), (one[0], one[1].model_state), rtol=1e-5, atol=1e-6
        )
        assert state.model_state["seen"] == 10
        assert np.abs(state.model_state["mean"]).max() > 1e-2


@every_mode
def test_each_step_device_and_micro_batch_has_its_own_noise(mode):
    """One row a piece: aux holds what each piece drew, in the place of its row."""

    def noisy(params, batch, rng):
        drawn = jax.random.uniform(rng, batch["row"].shape)
        return jnp.mean(drawn * params), jnp.mean(
            jax.nn.one_hot(batch["row"], 16) * drawn[:, None], axis=0
        )

    step = nag_jax.train_step(noisy, optax.sgd(1.0), mode=mode, accumulate=2, has_aux=True)
    params, key = jnp.zeros([]), jax.random.key(7)
    state, seen = step.init(params, rng=key), []
    for _ in range(3):
        params, state, metrics = step(params, state, {"row": np.arange(16)})
        seen.append(np.array(metrics["aux"]) * 16)
    assert len(np.unique(seen)) == 48
    np.testing.assert_allclose(params, -np.mean(seen, axis=1).sum(), rtol=1e-5)
    assert jax.random.uniform(key) == jax.random.uniform(state.rng)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_works_in_scan(mode, kind):
    step = nag_jax.train_step(loss, NAG, mesh=mesh_of(8, kind), mode=mode, accumulate=2)
    batches = [batch_of(29 + 0 * i) for i in range(6)]
    expected, _, _ = run(step, start(), batches)
    params = start()
    state = step.init(params)
    params = jax.device_put(params, NamedSharding(mesh_of(8, kind), P()))
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *batches)

    def body(carry, batch):
        params, state, metrics = step(*carry, batch)
        return (params, state), metrics["loss"]

    (params, state), losses = jax.jit(lambda c, b: jax.lax.scan(body, c, b))(
        (params, state), stacked
    )
    step.check(state)
    assert losses.shape == (6,)
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-6)


@every_mode
def test_compiles_once_and_donates(mode):
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    step = nag_jax.train_step(counted, NAG, mode=mode)
    params, batch = start(), batch_of(16)
    state = step.init(params)
    first, state, _ = step(params, state, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))  # the caller's own
    params = first
    for _ in range(3):
        old = params, state
        params, state, _ = step(params, state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert len(traces) == 1


def made_under(mesh, tree):
    with jax.set_mesh(mesh):
        return jax.tree.map(lambda x: 1 * jnp.asarray(x), tree)


def put(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def sliced(batch):
    """Rows out of the middle of an epoch that is spread over the devices."""
    rows = len(batch["y"])
    epoch = jax.tree.map(lambda x: np.concatenate([x + 1, x, x + 2, x + 3]), batch)
    return jax.tree.map(lambda x: x[rows : 2 * rows], put(epoch, mesh_of(4), "data"))


def elsewhere():
    return jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[6:])


EXPLICIT = AxisType.Explicit
PLACEMENTS = {
    "numpy": lambda tree: tree,
    "no device in particular": lambda tree: jax.tree.map(jnp.asarray, tree),
    "another device": lambda tree: jax.device_put(tree, jax.devices()[7]),
    "whole on the mesh": lambda tree: put(tree, mesh_of(4)),
    "whole on an explicit mesh": lambda tree: put(tree, mesh_of(4, EXPLICIT)),
    "whole on more devices": lambda tree: put(tree, mesh_of(8)),
    "whole on other devices": lambda tree: put(tree, elsewhere()),
    "made under set_mesh": lambda tree: made_under(mesh_of(4), tree),
    "made under an explicit set_mesh": lambda tree: made_under(mesh_of(4, EXPLICIT), tree),
}
BATCHES = PLACEMENTS | {
    "sliced": sliced,
    "rows on the mesh": lambda batch: put(batch, mesh_of(4), "data"),
    "rows on an explicit mesh": lambda batch: put(batch, mesh_of(4, EXPLICIT), "data"),
    "rows on other devices": lambda batch: put(batch, elsewhere(), "rows"),
    "leaves on different devices": lambda batch: (
        batch | {"x": jax.device_put(batch["x"], jax.devices()[5])}
    ),
}


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_may_lie_anywhere(mode, kind):
    """The batch, in each call; params and state, before the first step and before a later one."""
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    step = nag_jax.train_step(counted, NAG, mesh=mesh_of(4, kind), mode=mode, accumulate=2)
    params, batch = jax.device_get((start(), batch_of(12)))  # rows 8 to 11 do not divide evenly
    first = jax.device_get(step(params, step.init(params), batch)[:2])
    second = jax.device_get(step(*first, batch)[:2])
    chex.assert_trees_all_close(second[0], alone(NAG, params, [batch] * 2), rtol=0, atol=1e-6)
    traced = len(traces)
    for place in BATCHES.values():
        actual = step(*first, place(batch))[:2]
        chex.assert_trees_all_equal(jax.device_get(actual), second)
    for place in PLACEMENTS.values():
        given = place(params)
        chex.assert_trees_all_equal(jax.device_get(step.init(given)), step.init(params))
        actual = step(given, step.init(given), batch)[:2]
        chex.assert_trees_all_equal(jax.device_get(actual), first)
        actual = step(*place(first), batch)[:2]
        chex.assert_trees_all_equal(jax.device_get(actual), second)
    assert len(traces) == traced
    for foreign in (mesh_of(8, AxisType.Explicit), mesh_of(4, AxisType.Explicit), mesh_of(8)):
        with jax.set_mesh(foreign):
            given = jax.tree.map(jnp.asarray, params)
            params_, state, _ = step(given, step.init(given), batch)
            params_, state, _ = step(params_, state, jax.tree.map(jnp.asarray, batch))
            step.check(step.resume(state))
        chex.assert_trees_all_close(jax.device_get((params_, state)), second, rtol=1e-6)


@every_mode
def test_refuses_what_is_split_over_another_mesh(mode):
    """To gather it would take as many times the memory as there are parts, unasked."""
    step = nag_jax.train_step(loss, NAG, mesh=mesh_of(4), mode=mode)
    params = start()
    state = step.init(params)
    split = params | {"b": put(params["b"], elsewhere(), "rows")}
    for call in (lambda: step.init(split), lambda: step(split, state, batch_of(8))):
        with pytest.raises(ValueError, match=r"an array of shape \(8,\) is split over devices by"):
            call()


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_refuses_another_mesh_inside_jit(mode):
    auto, explicit = mesh_of(4), mesh_of(4, AxisType.Explicit)
    for own, other in ((auto, explicit), (explicit, auto), (auto, mesh_of(8))):
        step = nag_jax.train_step(loss, NAG, mesh=own, mode=mode)
        params = put(start(), own)
        state = step.init(params)
        with jax.set_mesh(other), pytest.raises(ValueError, match="a step made for Mesh"):
            jax.jit(step)(start(), jax.device_get(state), batch_of(8))
        if other.size == own.size:
            with pytest.raises(ValueError, match="pass that mesh to train_step"):
                jax.jit(step)(params, state, put(batch_of(8), other, "data"))
        with jax.set_mesh(own):
            jax.jit(step)(params, state, put(batch_of(8), own, "data"))


@every_mode
def test_calls_with_the_same_shapes_compile_nothing_anew(mode):
    step, params = nag_jax.train_step(loss, NAG, mode=mode, accumulate=2), start()
    state, batch = step.init(params), batch_of(29)
    given = jax.tree.map(jnp.asarray, batch)

    def calls():
        nonlocal params, state
        params, state, _ = step(params, state, batch)
        params, state, _ = step(params, step.resume(state), given)
        step.check(state)
        step.init(start())
        nag_jax.replicas_in_sync((params, state))
        nag_jax.eval_params(params, state.opt_state)

    calls()
    calls()
    assert programs.compilations(calls) == 0


@every_mode
def test_complex_parameters_descend(mode):
    step = nag_jax.train_step(
        lambda p, b: jnp.mean(jnp.abs(p * b - 2j) ** 2), optax.sgd(0.2), mode=mode
    )
    params, _, _ = run(step, jnp.asarray(1.0 + 1.0j), [np.full(16, 1j, np.complex64)] * 60)
    np.testing.assert_allclose(params, 2.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_other_axes_of_the_mesh_stay_free(mode, accumulate):
    """Tensor parallelism together with data parallelism."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    columns = {"w": P(None, "model"), "b": P("model"), "out": P("model")}
    params = {
        key: jax.device_put(p, NamedSharding(mesh, columns[key])) for key, p in start().items()
    }
    step = nag_jax.train_step(loss, NAG, mesh=mesh, mode=mode, accumulate=accumulate)
    batches = [batch_of(24), batch_of(26)] * 3
    actual, state, _ = run(step, params, batches)
    chex.assert_trees_all_close(actual, alone(NAG, start(), batches), rtol=0, atol=1e-6)
    shapes = {x.addressable_shards[0].data.shape for x in jax.tree.leaves((actual, state))}
    assert shapes == {(3, 4), (4,), ()}


@every_mode
def test_gradients_of_value_fn_are_right(mode):
    """As optax's zoom line search takes them; JAX's own would be those of one device in pmap."""

    def update(updates, state, params, *, value_fn, **extra):
        return jax.tree.map(lambda g: -0.05 * g, jax.grad(value_fn)(params)), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = nag_jax.train_step(loss, optimizer, mode=mode)
    batches = [batch_of(29)] * 3
    actual, _, _ = run(step, start(), batches)
    chex.assert_trees_all_close(actual, alone(optax.sgd(0.05), start(), batches), atol=1e-6)


def test_a_state_that_holds_one_array_twice_can_be_donated():
    """As that of optax.lbfgs does, which then crashed XLA on CPU."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, params

    optimizer = optax.GradientTransformation(init, lambda g, state, params=None: (g, state))
    run(nag_jax.train_step(loss, optimizer), start(), [batch_of(8)] * 3)


def wrong_gradients():
    """The table of migrating/pmap.md: for each body of a step, what it gives in each mapping."""
    page = (Path(__file__).parent.parent / "docs" / "migrating" / "pmap.md").read_text()
    table = page.split("| body of the step |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_gradients_of_steps_by_hand_are_what_the_page_says():
    pmean = lambda x: jax.lax.pmean(x, "data")
    value = lambda p, x: jnp.mean(x * p**2)
    cast = getattr(jax.lax, "pcast", None)
    varying = lambda p: cast(p, "data", to="varying") if cast else jax.lax.pvary(p, "data")
    bodies = [
        lambda p, x: pmean(jax.grad(value)(p, x)),
        lambda p, x: jax.grad(lambda p: pmean(value(p, x)))(p),
        lambda p, x: pmean(jax.grad(value)(varying(p), x)),
        lambda p, x: jax.grad(value)(p, x),
    ]
    p, x = jnp.float32(3), np.linspace(0.1, 2, 64, dtype=np.float32)
    right = jax.grad(value)(p, x)
    mapped = lambda body, check: jax.jit(
        jax.shard_map(
            body, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P(), check_vma=check
        )
    )(p, x)
    for body, (name, *cells) in zip(bodies, wrong_gradients(), strict=True):
        results = (
            mapped(body, True),
            mapped(body, False),
            jax.pmap(body, axis_name="data", in_axes=(None, 0), out_axes=None)(p, x.reshape(8, 8)),
        )
        for result, cell in zip(results, cells, strict=True):
            if cell == "differs by device":
                assert not nag_jax.replicas_in_sync(result), name
            else:
                times = {"right": 1, "8 times": 8}[cell]
                np.testing.assert_allclose(result / right, times, rtol=1e-5, err_msg=name)
                assert nag_jax.replicas_in_sync(result)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(mode="xmap"), "mode must be one of 'jit', 'shard_map', 'pmap'"),
        (dict(nonfinite="ignore"), "nonfinite must be one of"),
        (dict(accumulate=0), "accumulate must be an int of at least 1, got 0"),
        (dict(accumulate=2.0), "accumulate must be an int"),
        (dict(axis="rows"), "mesh"),
        (dict(mesh="cpu"), "mesh must be a jax.sharding.Mesh"),
        (dict(optimizer=nag_jax.nag), r"optimizer must be an optax\.GradientTransformation"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        nag_jax.train_step(loss, **(dict(optimizer=NAG, mesh=mesh_of(8)) | wrong))


@every_mode
def test_bad_calls(mode):
    step, params = nag_jax.train_step(loss, NAG, mode=mode), start()
    state = step.init(params)
    with pytest.raises(ValueError, match=r"step\.init"):
        step(params, state.opt_state, batch_of(8))
    with pytest.raises(ValueError, match="same number of rows"):
        step(params, state, batch_of(8) | {"y": np.ones(9)})
    with pytest.raises(ValueError, match="same number of rows"):
        step(params, state, np.float32(1))
    per_row = nag_jax.train_step(lambda p, b: b["x"] @ p["w"], NAG, mode=mode)
    with pytest.raises(ValueError, match="scalar"):
        per_row(params, per_row.init(params), batch_of(8))
    stateless = nag_jax.train_step(lambda p, b, model_state: loss(p, b), NAG, mode=mode)
    with pytest.raises(ValueError, match=r"must return \(loss, model_state\)"):
        stateless(params, stateless.init(params, model_state=jnp.ones(1)), batch_of(8))


def test_pmap_says_what_it_cannot_do():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="mesh of one axis"):
        nag_jax.train_step(loss, NAG, mesh=mesh, mode="pmap")
    step, params = nag_jax.train_step(loss, NAG, mode="pmap"), start()
    with pytest.raises(ValueError, match="inside jit or scan"):
        jax.jit(step)(params, step.init(params), batch_of(8))
