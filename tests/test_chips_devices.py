"""What a training step sends on eight chips, by the compilers for a TPU v5e and an H100.

They need ``pip install -e '.[chips]'`` and are skipped where that is missing; see
``benchmarks/collectives.py`` for how a program is read.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nag_jax
from benchmarks import chips
from benchmarks.collectives import sent
from nag_jax.devices.zero1 import Layout

pytestmark = [
    pytest.mark.slow,
    # JAX cannot read back from its cache what it has compiled for chips that are not here.
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]
every_mode = pytest.mark.parametrize("mode", ["jit", "shard_map"])
every_chip = pytest.mark.parametrize("chip", list(chips.CHIPS))
NAG = nag_jax.nag(0.1, 0.9)
OPTIMIZERS = {
    "nag": NAG,
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), NAG),
    "restarted": nag_jax.fista(0.1, restart="gradient"),
}
SHAPES = {
    "first": (1001, 512),
    "middle": (3, 512, 512),
    "last": (512, 1024),
    "bias": (512,),
    "scale": (),
}
# Along the first dimension that the devices divide; the others are too small.
SPLIT = {"first": P(None, "data"), "middle": P(None, "data"), "last": P("data")}
COLUMNS = {"last": P(None, "model")}
SPLIT_COLUMNS = SPLIT | {"last": P("data", "model")}


def loss(params, batch):
    x = jnp.tanh(batch @ params["first"] + params["bias"][None])
    for w in params["middle"]:
        x = jnp.tanh(x @ w)
    return params["scale"] * jnp.mean((x @ params["last"]) ** 2)


program_of = sent


@functools.cache
def sends(chip, name="nag", zero1=False, mode="jit", accumulate=1, columns=1, kind=AxisType.Auto):
    """What a device sends in a step, by kind of collective.

    The parameters are split over ``columns`` devices, and 8 / columns of these groups share the
    rows of a batch.
    """
    try:
        devices = np.array(chips.devices(chip))
        options = chips.options(chip)
    except RuntimeError as error:
        pytest.skip(str(error))
    if columns > 1:
        mesh = Mesh(devices.reshape(-1, columns), ("data", "model"), axis_types=(kind, kind))
    else:
        mesh = Mesh(devices, ("data",), axis_types=(kind,))
    array = lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    specs = COLUMNS if columns > 1 else {}
    split = (SPLIT_COLUMNS if columns > 1 else SPLIT) if zero1 else specs
    params = {
        name: array(np.empty(shape, np.float32), specs.get(name, P()))
        for name, shape in SHAPES.items()
    }
    optimizer = OPTIMIZERS[name]
    step = nag_jax.train_step(
        loss,
        nag_jax.zero1(optimizer, mesh) if zero1 else optimizer,
        mesh=mesh,
        mode=mode,
        accumulate=accumulate,
    )
    # Momentum has the shape of a parameter, and all shapes are different.
    by_shape = {shape: split.get(name, P()) for name, shape in SHAPES.items()}
    state = jax.tree.map(
        lambda x: array(x, by_shape.get(x.shape, P())), jax.eval_shape(step.init, params)
    )
    if zero1 and columns > 1:  # abstract arrays do not say how they are split
        layout = Layout(tuple((path, p.shape, p.sharding.spec) for path, p in _leaves(params)))
        state = state._replace(opt_state=state.opt_state._replace(layout=layout))
    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, None))
    batch = array(np.empty((256, 1001), np.float32), P("data"))
    return program_of(jitted.lower(params, state, batch).compile(compiler_options=options))


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def total(found):
    return sum(found.values())


@every_chip
@every_mode
@pytest.mark.parametrize("accumulate", [1, 4])
def test_data_parallel_sends_one_all_reduce(mode, accumulate, chip):
    found = sends(chip, mode=mode, accumulate=accumulate)
    gradient = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"] == pytest.approx(2 * gradient * 7 / 8, rel=1e-3)


@every_chip
@every_mode
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero1_sends_what_data_parallel_sends(name, accumulate, mode, chip):
    plain = total(sends(chip, mode=mode, accumulate=accumulate))
    found = sends(chip, name, True, mode, accumulate)
    assert total(found) <= 1.01 * plain
    assert found["reduce-scatter"] == found["all-gather"] == pytest.approx(plain / 2, rel=0.01)


@every_chip
def test_zero1_of_split_parameters(chip):
    """The rest is sent for the activations."""
    plain, found = (sends(chip, zero1=zero1, columns=2) for zero1 in (False, True))
    assert total(found) <= 1.01 * total(plain)
    assert found["reduce-scatter"] == pytest.approx(found["all-gather"], rel=0.01)


@every_chip
@pytest.mark.parametrize(("mode", "accumulate"), [("shard_map", 1), ("jit", 4)])
def test_zero1_under_explicit_axes(mode, accumulate, chip):
    plain = total(sends(chip, mode=mode, accumulate=accumulate))
    found = sends(chip, "nag", True, mode, accumulate, kind=AxisType.Explicit)
    assert total(found) <= 1.01 * plain
