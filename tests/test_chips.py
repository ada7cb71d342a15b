"""What steps move on a TPU v5e and an H100, by the compilers for them, on a machine with neither.

They need ``pip install -e '.[chips]'`` and are skipped where that is missing. The tree is one leaf
of 134 million elements, larger than the memory on the chips; see ``benchmarks/chips.py``.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nag_jax
from benchmarks import chips, collectives

pytestmark = pytest.mark.slow
every_chip = pytest.mark.parametrize("chip", list(chips.CHIPS))
CASES = chips.cases()
RESTARTS = [name for name in CASES if "restart" in name]
ROUNDED = [name for name in CASES if "stochastic" in name]
INNER = [name for name in CASES if "inner step" in name]
EXACT = [
    name
    for name in CASES
    if name.startswith(("nag", "rules.", "fista", "tmm", "pogm", "optista"))
    and name not in (*RESTARTS, *ROUNDED, "nag, int8_blocks", "nag_auto")
]


@functools.cache
def measured(name, chip, shapes=tuple(chips.TREES["one leaf of 134 M"])):
    try:
        chips.devices(chip)
        chips.options(chip)
    except RuntimeError as error:
        pytest.skip(str(error))
    return chips.measure(CASES[name], chip, list(shapes))


def test_every_kind_of_step_is_tested():
    assert len(EXACT) > 25
    assert len(RESTARTS) == 4
    assert len(ROUNDED) == 2
    assert len(INNER) >= 4


@every_chip
@pytest.mark.parametrize("name", EXACT)
def test_rules_and_recipes_move_the_least(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.001 * CASES[name].least
    assert program.temporaries < 0.01
    assert program.copies == 0


@every_chip
@pytest.mark.parametrize("name", [*RESTARTS, *ROUNDED, "averaged(nag)"])
def test_restarts_averages_and_rounding_move_the_least(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.01 * CASES[name].least
    assert program.temporaries < 0.01


@every_chip
def test_int8_buffers_are_read_twice_and_written_once(chip):
    program = measured("nag, int8_blocks", chip)
    assert program.moved <= 1.05 * CASES["nag, int8_blocks"].least
    assert program.temporaries < 0.1


@every_chip
def test_int8_costs_nothing_where_leaves_are_small(chip):
    shapes = ((64, 64),) * 50
    program, unit = (measured(name, chip, shapes) for name in ("nag, int8_blocks", "nag"))
    assert program.moved <= 1.02 * unit.moved


@every_chip
@pytest.mark.parametrize(
    "shape", [(50257, 2816), (32768, 1000), (12288, 128, 64), (3, 3, 1024, 8192)]
)
def test_int8_buffers_of_any_shape_are_not_copied(shape, chip):
    """Whatever layout XLA chooses: odd lengths, a last axis that is not a multiple of a tile."""
    program = measured("nag, int8_blocks", chip, (shape,))
    assert program.temporaries < 0.2
    # On a TPU the int8 numbers of the smaller leaves pass through the memory on the chip, and XLA
    # counts them twice.
    twice = 7 if chip == "v5e" and math.prod(shape) < 2**27 else 0
    assert program.moved <= 19.75 + twice


@every_chip
@pytest.mark.parametrize("name", INNER)
def test_a_step_of_outer_without_sync_moves_what_the_inner_optimizer_moves(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.001 * CASES[name].least
    assert program.copies == 0


@every_chip
@pytest.mark.parametrize(("inner", "least"), [("sgd", 12), ("adam", 28), ("nag", 20)])
def test_a_step_of_outer_that_does_not_meet_reads_the_slow_copy_at_most(inner, least, chip):
    """Besides what the inner optimizer moves; whether it meets is known only when it runs."""
    measured("nag", chip)
    if chip == "h100" and jax.__version_info__ < (0, 12):
        pytest.skip("the XLA of jax 0.10 copies on a GPU whatever passes through a branch")
    make = {"sgd": optax.sgd, "adam": optax.adam, "nag": nag_jax.nag}[inner]
    params = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in chips.TREES["one leaf of 134 M"]
    ]
    compiled = chips.compile_step(chip, nag_jax.snoo(make(0.1)), params)
    parameters = sum(p.size for p in params)
    assert chips.moved_without_branch(compiled, parameters) <= 1.001 * (least + 4)
    program = chips.read(compiled, parameters)
    assert program.copies == 0
    assert program.temporaries < 0.01


@every_chip
@pytest.mark.parametrize(("name", "most"), [("adanag", 36), ("nag_auto", 44), ("backtracking", 44)])
def test_automatic_step_sizes(name, most, chip):
    """What they need at least is in ``benchmarks/chips.py``; the last two move more."""
    program = measured(name, chip)
    assert program.moved <= 1.001 * most
    assert program.temporaries < 0.01
    assert program.copies == 0


SITES, EVERY = ("site", "data"), 32


def on_two_slices(optimizer, *syncs, host=False):
    """Steps of two workers, each a slice of four v5e, as one program, and its parameters."""
    try:
        devices = chips.devices(
            "v5e", topology_name="v5e:2x2", num_slices=2, chip_config_name="default",
            chips_per_host_bounds=(2, 2, 1),
        )  # fmt: skip
    except RuntimeError as error:
        pytest.skip(str(error))
    devices = sorted(devices, key=lambda device: (device.slice_index, device.id))
    mesh = Mesh(np.array(devices).reshape(2, 4), SITES)
    row = PartitionSpec("site")
    params = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(4)}
    params["b"] = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def loss_fn(params, x):
        for i in range(4):
            x = jnp.tanh(x @ params[f"w{i}"])
        return jnp.mean((x + params["b"][None]) ** 2)

    def worker(params, state, x):
        params, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        for sync in syncs:
            gradient = jax.lax.pmean(jax.grad(loss_fn)(params, x), "data")
            updates, state = optimizer.update(gradient, state, params, sync=sync)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda leaf: leaf[None], (params, state))

    def rows(tree, memory_kind="device"):
        def place(x):
            kind = memory_kind if x.ndim else "device"
            sharding = NamedSharding(mesh, row, memory_kind=kind)
            return jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=sharding)

        return jax.tree.map(place, tree)

    state = jax.eval_shape(optimizer.init, params)
    placed = rows(state)
    if host:
        slow, outer = (rows(tree, "pinned_host") for tree in (state.slow, state.outer))
        placed = placed._replace(slow=slow, outer=outer)
    batch = NamedSharding(mesh, PartitionSpec(SITES))
    step = jax.shard_map(
        worker, mesh=mesh, in_specs=(row, row, batch.spec), out_specs=row, check_vma=False
    )
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=batch)
    arguments = rows(params), placed, x
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile(), params


def crossing(compiled):
    """The collectives of a program between the two slices."""
    found = collectives.collectives(compiled)
    return [c for c in found if collectives.crossing(c.groups, [0] * 4 + [1] * 4)]


# JAX cannot read back from its cache what it has compiled for chips that are not here.
uncached = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@uncached
@pytest.mark.parametrize("options", [{}, dict(fragments=2, delay=2, mixing=0.5, weighted=True)])
def test_slices_send_one_array_when_a_fragment_meets_and_nothing_else(options):
    optimizer = nag_jax.diloco(nag_jax.nag(0.1), "site", every=EVERY, **options)
    rounds = dict(every=EVERY, fragments=options.get("fragments", 1), delay=options.get("delay", 0))
    sent, steps = 0.0, {nag_jax.meeting(step, **rounds) for step in range(33, 65)}
    for sync in steps:
        compiled, params = on_two_slices(optimizer, sync)
        found = crossing(compiled)
        assert [c.kind for c in found] == ["all-reduce"] * (sync.sends is not None)
        assert len(collectives.collectives(compiled)) > len(found)  # gradients, in a slice
        sent += sum(c.bytes for c in found)
    parameters = sum(p.size for p in params.values())
    assert sent == pytest.approx(4 * parameters, rel=1e-3)  # with weights padded


@uncached
@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 2), (jnp.int8, 1), (jnp.int4, 0.5)])
def test_slices_send_one_array_of_fewer_bytes(dtype, size):
    optimizer = nag_jax.diloco(
        nag_jax.nag(0.1), "site", every=EVERY, weighted=True, send_dtype=dtype
    )
    assert crossing(on_two_slices(optimizer, False)[0]) == []
    compiled, params = on_two_slices(optimizer, True)
    (found,) = crossing(compiled)
    parameters = sum(p.size for p in params.values())
    assert size * parameters <= found.bytes <= 1.05 * size * parameters


@uncached
def test_the_steps_of_a_delay_run_while_a_displacement_travels():
    optimizer = nag_jax.diloco(optax.sgd(0.1), "site", every=EVERY, delay=3, mixing=0.5)
    syncs = [nag_jax.meeting(step, every=EVERY, delay=3) for step in range(EVERY, EVERY + 4)]
    compiled, _ = on_two_slices(optimizer, *syncs)
    schedule = chips.computation(compiled.as_text())
    between = schedule[schedule.index(" send(") : schedule.index(" recv-done(")]
    assert sum("dot_general" in line for line in between.splitlines()) >= 3 * 10  # three steps


@uncached
def test_the_slow_copy_and_the_outer_momentum_leave_the_device():
    arguments = {}
    for memory_kind in (None, "pinned_host"):
        optimizer = nag_jax.diloco(nag_jax.nag(0.1), "site", every=EVERY, memory_kind=memory_kind)
        for sync in (False, True):
            compiled, params = on_two_slices(optimizer, sync, host=memory_kind is not None)
            parameters, memory = sum(p.size for p in params.values()), compiled.memory_analysis()
            sizes = memory.argument_size_in_bytes, memory.host_argument_size_in_bytes
            arguments[memory_kind, sync] = [size / parameters for size in sizes]
            assert memory.alias_size_in_bytes >= 7.9 * parameters
    for sync in (False, True):
        assert arguments[None, sync] == pytest.approx([16, 0], abs=0.1)
        assert arguments["pinned_host", sync] == pytest.approx([8, 8], abs=0.1)
