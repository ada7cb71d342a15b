"""pmap, jit and shard_map side by side: one model, three mechanisms, the same numbers.

``python -m examples.multi_device`` runs on all GPUs or TPU cores there are, or on 8 virtual CPU
devices where there is only a CPU.
"""

import argparse
import os

# Before jax starts: 8 virtual devices, and threads enough that they do not wait for each other.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import nag_jax

STEPS, ROWS = 200, 1003  # rows that 8 devices cannot divide evenly


def loss_fn(params, batch):
    """Mean over the rows of the batch, be it the whole one or a device's part."""
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def make_batch():
    x = np.random.default_rng(0).normal(size=(ROWS, 16)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1))}


def make_params():
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (16, 256)) / 4
    return {"w": w, "out": jax.random.normal(keys[1], (256,)) / 16}


def train(mode, mesh, optimizer):
    step = nag_jax.train_step(loss_fn, optimizer, mesh=mesh, mode=mode)
    params, batch = make_params(), make_batch()
    state, loss = step.init(params), jnp.inf
    for _ in range(STEPS):
        params, state, metrics = step(params, state, batch)
        loss = metrics["loss"]  # still on the device: nothing waits here
    step.check(state)
    assert nag_jax.replicas_in_sync(params)
    return params, state, float(loss)


def main():
    argparse.ArgumentParser(
        prog="python -m examples.multi_device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    optimizer = nag_jax.nag(0.05, 0.9)
    first, _, loss = train("jit", mesh, optimizer)
    print(f"{mesh.size} devices, {STEPS} steps")
    print(f"{'jit':17} loss {loss:.6f}")
    split = nag_jax.zero1(optimizer, mesh)
    for name, mode, tx in (
        ("shard_map", "shard_map", optimizer),
        ("pmap", "pmap", optimizer),
        ("jit, split state", "jit", split),
    ):
        params, state, loss = train(mode, mesh, tx)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(first), strict=True)
        difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        print(
            f"{name:17} loss {loss:.6f}, params differ by {difference:.1e}, {held} bytes of state"
        )


if __name__ == "__main__":
    main()
