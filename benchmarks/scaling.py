"""Steps per second and bytes moved, by mode and number of devices.

``python -m benchmarks.scaling`` takes all GPUs or TPU cores there are, or 8 virtual CPU devices,
which share the machine's cores: there only the order of the rows means something, and the bytes.
Steps per second of CPU time do not depend on other programs on the machine. Writes
benchmarks/results/scaling.json.
"""

import os

# Before jax starts: virtual devices wait for each other where threads are fewer.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("PJRT_NPROC", "32")

import argparse
import functools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import nag_jax
from benchmarks.machine import describe_machine

_RESULT = Path(__file__).parent / "results" / "scaling.json"
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "f64": 8, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled program."""
    found: dict[str, int] = {}
    for shapes, name in _COLLECTIVE.findall(program):
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = int(np.prod([int(n) for n in dimensions.split(",") if n]))
            found[name] = found.get(name, 0) + count * _BYTES[dtype]
    return found


def sent(found: dict[str, int], devices: int) -> float:
    """Bytes that each device sends, by the ring algorithms.

    A result of S bytes takes 2S(N-1)/N as an all-reduce and S(N-1)/N as an all-gather; a
    reduce-scatter, whose result is 1/N of what goes in, S(N-1).
    """
    share = (devices - 1) / devices
    weight = {"all-reduce": 2 * share, "reduce-scatter": devices - 1, "collective-permute": 1}
    return sum(size * weight.get(name, share) for name, size in found.items())


def loss_fn(params: Any, batch: Any, product: Any = jnp.matmul) -> jax.Array:
    hidden = batch["x"]
    for w in params["hidden"]:
        hidden = jnp.tanh(product(hidden, w))
    return jnp.mean((product(hidden, params["out"]) - batch["y"]) ** 2)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w``, whose gradient for w is not the transpose of a product, as JAX has it."""
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def make_params(width: int) -> Any:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:3]]
    return {"hidden": hidden, "out": jax.random.normal(keys[3], (width, 8)) / width**0.5}


def make_batch(rows: int, width: int) -> Any:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"x": draw(rows, width), "y": draw(rows, 8)}


WAYS = ("jit", "shard_map", "pmap", "jit, zero1", "jit, fsdp", "jit, accumulate 4")
MORE_WAYS = ("jit, untransposed",)


def prepare(way: str, mesh: Mesh, width: int) -> tuple[Any, Any]:
    """The step and the parameters, where they belong."""
    optimizer: optax.GradientTransformation = nag_jax.nag(1e-3, 0.9)
    first, _, extra = way.partition(", ")
    mode = cast(Literal["jit", "shard_map", "pmap"], first)
    params = make_params(width)
    if extra == "zero1":
        optimizer = nag_jax.zero1(optimizer, mesh)
    if extra == "fsdp":
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
    accumulate = 4 if extra == "accumulate 4" else 1
    loss = functools.partial(loss_fn, product=product) if extra == "untransposed" else loss_fn
    return nag_jax.train_step(loss, optimizer, mesh=mesh, mode=mode, accumulate=accumulate), params


def measure(way: str, devices: int, options: argparse.Namespace) -> dict[str, Any]:
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    step, params = prepare(way, mesh, options.width)
    batch, state = make_batch(options.rows, options.width), step.init(params)
    if not way.startswith("pmap"):
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    found = collectives(step.lower(params, state, batch).compile().as_text())
    rates, cpu_rates = [], []
    for _ in range(options.rounds + 1):  # the first compiles
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            params, state, _ = step(params, state, batch)
        jax.block_until_ready(params)
        rates.append(options.steps / (time.perf_counter() - start))
        cpu_rates.append(options.steps / (time.process_time() - cpu_start))
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    return {
        "way": way,
        "devices": devices,
        "steps_per_second": round(statistics.median(rates[1:]), 2),
        "least_and_most": [round(min(rates[1:]), 2), round(max(rates[1:]), 2)],
        "steps_per_cpu_second": round(statistics.median(cpu_rates[1:]), 2),
        "collective_bytes": found,
        "bytes_sent_by_device": round(sent(found, devices)),
        "bytes_held_by_device": held((params, state)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the three hidden layers")
    parser.add_argument("--rows", type=int, default=1024, help="of the whole batch")
    parser.add_argument("--steps", type=int, default=10, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS + MORE_WAYS, default=WAYS)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=_RESULT)
    options = parser.parse_args()
    counts = [n for n in options.devices if n <= jax.device_count()]
    size = sum(x.nbytes for x in jax.tree.leaves(make_params(options.width)))
    print(f"parameters: {size} bytes, on {jax.devices()[0].device_kind}")
    results = []
    for devices in counts:
        for way in options.ways:
            results.append(measure(way, devices, options))
            print(json.dumps(results[-1]))
    report = describe_machine("benchmarks.scaling") | {
        "device": jax.devices()[0].device_kind,
        "virtual": jax.devices()[0].platform == "cpu",
        "parameter_bytes": size,
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
