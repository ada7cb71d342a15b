"""One update over all devices by jit, shard_map and pmap, with the numbers of a single device.

    python -m examples.multi_device

It runs on all GPUs or TPU cores, or on 8 virtual devices where there is only a CPU.
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

# Before jax is imported. With fewer threads, virtual devices may wait for each other forever.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from sklearn.datasets import load_digits

import nag_jax

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def init_params(seed: int) -> Params:
    """A network with one hidden layer, for images of 8x8 pixels and ten digits."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "logits": jax.random.normal(keys[1], (128, 10)) / 12,
    }


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """The mean over the rows of ``batch``: all rows with jit, a device's own with the others."""
    logits = jnp.tanh(batch["images"] @ params["hidden"]) @ params["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def train_on_one(
    optimizer: optax.GradientTransformation, params: Params, batch: Batch, steps: int
) -> Params:
    """The usual loop on one device, with which the others must agree."""

    @jax.jit
    def step(params: Params, opt_state: optax.OptState):
        gradients = jax.grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return nag_jax.eval_params(params, opt_state)


def train_on_all(
    step: nag_jax.TrainStep, params: Params, batch: Batch, steps: int
) -> tuple[Params, int]:
    """The evaluated iterate, and the bytes of optimizer state that each device holds."""
    state = step.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state, batch)  # without waiting for the devices
    step.check(state)  # raises if a gradient was not finite
    assert nag_jax.replicas_in_sync(params)
    buffers = jax.tree.leaves(state.opt_state)
    held = sum(buffer.addressable_shards[0].data.nbytes for buffer in buffers)
    return nag_jax.eval_params(params, state.opt_state), held


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")

    images, labels = load_digits(return_X_y=True)  # 1797 rows: more for some devices than others
    batch = {"images": jnp.asarray(images / 16), "labels": jnp.asarray(labels)}
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    optimizer = nag_jax.nag(0.1, momentum=0.9)
    split = nag_jax.zero1(optimizer, mesh)  # each device holds a part of the momentum

    expected = train_on_one(optimizer, init_params(options.seed), batch, options.steps)
    print(f"one device: loss {loss_fn(expected, batch):.6f}")
    differences = {}
    train_steps = {
        "jit": nag_jax.train_step(loss_fn, optimizer, mesh=mesh, mode="jit"),
        "shard_map": nag_jax.train_step(loss_fn, optimizer, mesh=mesh, mode="shard_map"),
        "pmap": nag_jax.train_step(loss_fn, optimizer, mesh=mesh, mode="pmap"),
        "jit + zero1": nag_jax.train_step(loss_fn, split, mesh=mesh, mode="jit"),
    }
    for name, step in train_steps.items():
        # The step takes over the buffers of its arguments, so each run makes its own params.
        found, held = train_on_all(step, init_params(options.seed), batch, options.steps)
        errors = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), found, expected)
        differences[name] = float(max(errors.values()))
        assert differences[name] < 1e-5, f"{name} differs by {differences[name]}"
        print(
            f"{mesh.size} devices, {name:11}: largest difference {differences[name]:.0e}, "
            f"{held} bytes of optimizer state on each"
        )
    return differences


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
