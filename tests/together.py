"""What each of two processes runs for test_two_processes.py, and writes into a JSON file.

``python tests/together.py PORT NUMBER FILE``
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent.parent))

import nag_jax

STEPS, ROWS = 10, 32
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), nag_jax.nag(0.05, 0.9))


def start():
    return {"w": jnp.linspace(-1.0, 1.0, 8 * 128).reshape(8, 128), "b": jnp.zeros(128)}


def batch_of(rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(1)), "scale": np.linspace(0.1, 2, rows, dtype=np.float32)}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return jnp.mean(batch["scale"] * (hidden.mean(axis=1) - batch["y"]) ** 2)


def train(mesh, mode, split, accumulate, spoil, count=ROWS):
    """Params as numbers, whether all devices of all processes agree, and the skipped steps."""
    optimizer = nag_jax.zero1(OPTIMIZER, mesh) if split else OPTIMIZER
    step = nag_jax.train_step(
        loss, optimizer, mesh=mesh, mode=mode, accumulate=accumulate, nonfinite="skip"
    )
    half = count // 2
    mine = slice(jax.process_index() * half, (jax.process_index() + 1) * half)
    rows = {name: x[mine].copy() for name, x in batch_of(count).items()}
    bad = {name: x.copy() for name, x in rows.items()}
    bad["x"][-1, 0] = np.nan if jax.process_index() == 1 else 0
    everywhere = lambda tree: jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x), tree
    )
    params, batch = start(), everywhere(rows)
    state = step.init(params)
    for _ in range(STEPS):
        params, state, _ = step(params, state, batch)
    if spoil:
        params, state, _ = step(params, state, everywhere(bad))
    try:
        step(params, state, rows)
        refused = "not refused"
    except ValueError as error:
        refused = str(error)
    in_sync = nag_jax.replicas_in_sync((params, state))
    numbers = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).tolist(), params)
    skipped = int(state.skipped)
    return dict(params=numbers, in_sync=in_sync, skipped=skipped, rows=count, refused=refused)


def unequal(mesh, spec, numbers):
    """Ones, to which each device of the mesh adds its number."""
    sharding = NamedSharding(mesh, spec)
    part = jnp.ones(sharding.shard_shape((8,)))
    added = zip(mesh.devices.flat, numbers, strict=True)
    mine = [jax.device_put(part + n, d) for d, n in added if d.process_index == jax.process_index()]
    return jax.make_array_from_single_device_arrays((8,), sharding, mine)


def main():
    port, number, file = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    pairs = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    whole = lambda *numbers: nag_jax.replicas_in_sync({"a": unequal(mesh, P(), numbers)})
    over = lambda spec: nag_jax.replicas_in_sync(unequal(pairs, spec, (0, 0, 1, 1)))
    runs = (
        ("jit", False, 1, True),
        ("shard_map", False, 2, False),
        ("jit", True, 1, False),
        ("shard_map", True, 1, False),
        ("jit", False, 2, False, ROWS + 4),  # 4 rows more than 2 micro-batches on 4 devices take
    )
    found = {
        "devices": [jax.local_device_count(), jax.device_count()],
        "equal": whole(0, 0, 0, 0),
        "the other process": whole(0, 0, 1, 1),
        "one device of the second": whole(0, 0, 0, 1),
        "one device of the first": whole(0, 1, 0, 0),
        "parts, a process each": over(P("data")),
        "parts that processes share": over(P("model")),
        "runs": [train(mesh, *run) for run in runs],
    }
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
