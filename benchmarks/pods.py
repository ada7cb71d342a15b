"""Memory and traffic of training a language model on pods, from programs compiled for them.

    pip install -e '.[chips]' && python -m benchmarks.pods [--only "v5e-64, 7 B"] [--print]

A decoder-only transformer is compiled with a :mod:`nag_jax` optimizer for GPUs and TPUs that are
not there; parameters are shapes, and nothing is allocated or run. The compiled program has the
memory that a chip needs, the bytes that it sends by kind of collective, and which of these cross
from one slice of a pod to another. Layers are one ``lax.scan`` and each is computed again in the
backward pass; activations are bfloat16, parameters and momentum float32.
"""

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import chips  # before jax: it sets the environment for the compilers

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nag_jax
from benchmarks import collectives
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source

RESULTS = Path(__file__).parent / "results" / "pods.json"
VOCABULARY, LENGTH, SEQUENCES = 25600, 2048, 2  # tokens in a sequence, sequences of a chip
TENSOR, EVERY = 4, 500  # chips that share a layer in tensor parallelism; H of DiLoCo
GB = 1e9


class Model(NamedTuple):
    """The shapes of GPT-3."""

    layers: int
    width: int
    heads: int

    def shapes(self) -> dict[str, Any]:
        """The shape of each parameter, and the axes over which FSDP ("data") and tensor parallelism
        ("model") split it.
        """
        n, d = self.layers, self.width
        return {
            "tokens": ((VOCABULARY, d), P("data")),
            "positions": ((LENGTH, d), P("data")),
            "head": ((d, VOCABULARY), P("data", "model")),
            "layers": {
                "norms": ((n, 2, d), P()),
                "qkv": ((n, 3, d, d), P(None, None, "data", "model")),
                "out": ((n, d, d), P(None, ("data", "model"))),
                "up": ((n, d, 4 * d), P(None, "data", "model")),
                "down": ((n, 4 * d, d), P(None, ("data", "model"))),
            },
        }


MODELS = {"125 M": Model(12, 768, 12), "1.3 B": Model(24, 2048, 16), "7 B": Model(32, 4096, 32)}


class Pod(NamedTuple):
    """Chips of one kind, in one slice or in several with a slow network between them."""

    chip: str  # for benchmarks.chips
    memory: float  # of a chip, in bytes
    chips: int  # of a slice
    topology: dict[str, Any]
    slices: int = 1


TWO = {"num_slices": 2, "chip_config_name": "default", "chips_per_host_bounds": (2, 2, 1)}
PODS = {
    "8 H100": Pod("h100", 80 * GB, 8, {}),
    "v5e-64": Pod("v5e", 16 * GB, 64, {"topology_name": "v5e:8x8"}),
    "v5p-64": Pod("v5e", 95 * GB, 64, {"topology_name": "v5:4x4x4"}),
    "v5p-512": Pod("v5e", 95 * GB, 512, {"topology_name": "v5:8x8x8"}),
    "2 x v5e-64": Pod("v5e", 16 * GB, 64, {"topology_name": "v5e:8x8", **TWO}, slices=2),
}


class Plan(NamedTuple):
    """How a training step is divided over the chips."""

    split: tuple[str, ...] = ()  # axes of the mesh over which parameters are split
    tensor: int = 1  # chips along the axis "model"
    zero1: bool = False
    mode: Literal["jit", "shard_map"] = "jit"
    sync: bool | None = None  # of a step of DiLoCo, whose workers are the slices


PLANS = {
    "data parallel": Plan(),
    "ZeRO-1": Plan(zero1=True),
    "ZeRO-1, shard_map": Plan(zero1=True, mode="shard_map"),
    "FSDP": Plan(("data",)),
    "tensor + data parallel": Plan(("model",), tensor=TENSOR),
    "DiLoCo, inner step": Plan(("data",), sync=False),
    "DiLoCo, outer step": Plan(("data",), sync=True),
}
ACROSS_SLICES = ("data parallel", "FSDP", "DiLoCo, inner step", "DiLoCo, outer step")


def loss_fn(
    model: Model, split: Callable[..., jax.Array], params: Any, batch: dict[str, jax.Array]
) -> jax.Array:
    """The mean cross-entropy of the next token.

    ``split(x, *axes)`` splits an array over these axes of the mesh, and all other dimensions not.
    """
    half = lambda x: x.astype(jnp.bfloat16)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return half(wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)) * scale

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = norm(x, w["norms"][0])
        heads = lambda y: split(y.reshape(*y.shape[:2], model.heads, -1), "data", None, "model")
        q, k, v = (heads(y @ weight) for weight in w["qkv"])
        y = split(jax.nn.dot_product_attention(q, k, v, is_causal=True), "data", None, "model")
        x = split(x + y.reshape(x.shape) @ w["out"], "data", "model")
        y = split(norm(x, w["norms"][1]) @ w["up"], "data", None, "model")
        return split(x + jax.nn.gelu(y) @ w["down"], "data", "model"), None

    params = jax.tree.map(half, params)
    x = split(params["tokens"])[batch["tokens"]] + params["positions"]
    x, _ = jax.lax.scan(jax.checkpoint(layer), split(x, "data", "model"), params["layers"])
    logits = split(x @ params["head"], "data", None, "model").astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def lower(model: Model, pod: Pod, plan: Plan) -> jax.stages.Lowered:
    """The step of a plan, for abstract parameters."""
    shape = (pod.slices, pod.chips // plan.tensor, plan.tensor)
    devices = np.array(chips.devices(pod.chip, **pod.topology)).reshape(shape)
    mesh = Mesh(devices, ("slice", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    workers = () if plan.sync is None else ("slice",)
    mapped = workers or ("data",) * (plan.mode == "shard_map")

    def split(x: jax.Array, *axes: str | None) -> jax.Array:
        rows = tuple(name for name in ("slice", "data") if name not in mapped)
        spec = P(*(rows if axis == "data" else axis for axis in axes))
        return jax.lax.with_sharding_constraint(x, spec if mapped else NamedSharding(mesh, spec))

    def shaped(shape: tuple[int, ...], spec: P, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        names = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
        spec = P(*workers, *(tuple(n for n in dim if n in plan.split) for dim in names))
        shape = (*(pod.slices for _ in workers), *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    is_leaf = lambda x: isinstance(x, tuple)
    params = jax.tree.map(lambda leaf: shaped(*leaf), model.shapes(), is_leaf=is_leaf)
    rows = SEQUENCES * (pod.chips if workers else pod.chips * pod.slices)
    batch = dict.fromkeys(("tokens", "labels"), shaped((rows, LENGTH), P(), jnp.int32))
    loss, optimizer = functools.partial(loss_fn, model, split), nag_jax.nag(1e-2, 0.9)
    known = {p.shape: p.sharding for p in jax.tree.leaves(params)}
    whole = NamedSharding(mesh, P(*workers))
    as_params = lambda x: x.update(sharding=known.get(x.shape, whole))
    if workers:
        optimizer = nag_jax.diloco(optimizer, "slice", every=EVERY)
        state = jax.tree.map(as_params, jax.eval_shape(jax.vmap(optimizer.init), params))
        return lower_diloco(mesh, loss, optimizer, plan.sync, params, state, batch)
    if plan.zero1:
        optimizer = nag_jax.zero1(optimizer, mesh)
    step = nag_jax.train_step(loss, optimizer, mesh=mesh, mode=plan.mode)
    state = jax.eval_shape(step.init, params)
    if plan.zero1:
        init = jax.jit(step.init).lower(params).compile(compiler_options=chips.options(pod.chip))
        state = jax.tree.map(lambda x, s: x.update(sharding=s), state, init.output_shardings)
    else:
        state = jax.tree.map(as_params, state)
    return step.lower(params, state, batch)


def lower_diloco(
    mesh: Mesh, loss: Callable[..., jax.Array], optimizer: Any, sync: bool | None, *arguments: Any
) -> jax.stages.Lowered:
    """A step of DiLoCo for ``arguments`` (params, state, batch) with a row for each slice."""

    def step(*rows: Any) -> Any:
        params, state, batch = jax.tree.map(lambda x: x[0], rows)
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params, sync=sync)
        out = optax.apply_updates(params, updates), state, value
        return jax.tree.map(lambda x: x[None], out)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("slice"), out_specs=P("slice"),
        axis_names={"slice"}, check_vma=False)  # fmt: skip
    kept = jax.tree.map(lambda x: x.sharding, arguments[:2])
    out = (*kept, NamedSharding(mesh, P("slice")))
    return jax.jit(mapped, donate_argnums=(0, 1), out_shardings=out).lower(*arguments)


def parameters(shapes: Any) -> int:
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(shape) for shape, _ in leaves)


class Formula(NamedTuple):
    """Bytes that a chip sends for a step by ring algorithms."""

    in_all: float
    between_slices: float = 0.0


def formula(model: Model, pod: Pod, name: str) -> Formula | None:
    """What docs/many_devices.md says of a plan; None where it says nothing.

    Gradients and gathered weights are bfloat16, updates and displacements float32. With mode
    "shard_map" gradients are summed over the layers first, in float32.
    """
    p, n, k = parameters(model.shapes()), pod.chips, pod.slices
    layers = parameters(model.shapes()["layers"])
    ring = lambda size, chips: size * (chips - 1) / chips
    fsdp = 2 * ring(2 * p, n) + ring(2 * layers, n)  # layers are gathered again going backward
    crossing = lambda size: 2 * ring(size * p / n, k)
    match name:
        case "data parallel":
            return Formula(2 * ring(2 * p, n * k))
        case "ZeRO-1":
            return Formula(ring(2 * p, n) + ring(4 * p, n))
        case "ZeRO-1, shard_map":
            return Formula(2 * ring(4 * p, n))
        case "FSDP":
            return Formula(fsdp + crossing(2), crossing(2))
        case "DiLoCo, inner step":
            return Formula(fsdp)
        case "DiLoCo, outer step":
            return Formula(fsdp + crossing(4), crossing(4))
    return None


def measure(model: Model, pod: Pod, name: str) -> dict[str, Any]:
    """Memory in bytes and bytes sent by a chip, or why there is no program."""
    plan, expected = PLANS[name], formula(model, pod, name)
    if "data" in plan.split and model.width % pod.chips:
        return {"reason": f"width {model.width} cannot be split over {pod.chips} chips"}
    start = time.perf_counter()
    try:
        lowered = lower(model, pod, plan)
        compiled = lowered.compile(compiler_options=chips.options(pod.chip))
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"memory required .*\(([\d.]+)G\) exceeds .*\.", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        return {"fits": False, "memory": float(found[1]) * 2**30, "error": found[0]}
    used = compiled.memory_analysis()
    assert used is not None
    outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    memory = used.argument_size_in_bytes + outputs + used.temp_size_in_bytes
    found = collectives.collectives(compiled)
    slices = [number for number in range(pod.slices) for _ in range(pod.chips)]
    crossing = [c for c in found if collectives.crossing(c.groups, slices)]
    return {
        "fits": memory <= pod.memory,
        "memory": memory,
        "arguments": used.argument_size_in_bytes,
        "outputs": outputs,
        "temporaries": used.temp_size_in_bytes,
        "sent": collectives.sent(compiled),
        "formula": expected and expected.in_all,
        "between_slices": sum(c.bytes for c in crossing),
        "formula_between_slices": expected and expected.between_slices,
        "seconds": round(time.perf_counter() - start),
    }


def cases() -> list[tuple[str, str, str]]:
    """Pod, model and plan of each row."""
    return [
        (pod, model, plan)
        for pod in PODS
        for model in MODELS
        for plan in PLANS
        if (PODS[pod].slices == 1 and PLANS[plan].sync is None)
        or (PODS[pod].slices > 1 and plan in ACROSS_SLICES)
    ]


def needed(row: dict[str, Any]) -> str:
    if "memory" not in row:
        return row.get("reason", "not compiled")
    return f"{row['memory'] / GB:.1f}" + (" (does not fit)" if not row["fits"] else "")


def sent(row: dict[str, Any]) -> str:
    if "sent" not in row:
        return "-"
    total = sum(row["sent"].values())
    return f"{total / GB:.2f}" + (f" ({total / row['formula']:.2f})" if row["formula"] else "")


def by_plan(result: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    """A table with a row for each model on each pod of one slice."""
    plans = [name for name, plan in PLANS.items() if plan.sync is None]
    cells = {
        (pod, model): [cell(result["rows"].get(f"{pod}, {model}, {plan}", {})) for plan in plans]
        for pod in PODS
        for model in MODELS
        if PODS[pod].slices == 1
    }
    rows = [[*names, *row] for names, row in cells.items() if set(row) != {"-"}]
    return markdown(["pod", "parameters", *plans], rows, text_columns=2)


def by_slices(result: dict[str, Any]) -> str:
    """What a chip of several slices needs, sends, and sends to the other slices."""
    rows = []
    for name, row in result["rows"].items():
        pod, model, plan = name.split(", ", 2)
        if PODS[pod].slices > 1:
            between = f"{row['between_slices'] / 1e6:.1f}" if "sent" in row else "-"
            rows.append([pod, model, plan, needed(row), sent(row), between])
    head = ["pod", "parameters", "plan", "GB needed", "GB sent", "MB of these between slices"]
    return markdown(head, rows, text_columns=3)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "memory": lambda result: f"{source(result)}\n\n{by_plan(result, needed)}",
    "traffic": lambda result: by_plan(result, sent),
    "slices": by_slices,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and traffic of training on pods.")
    parser.add_argument("--only", nargs="*", help="beginnings of names, such as 'v5e-64, 7 B'")
    parser.add_argument("--missing", action="store_true", help="only those without a result")
    parser.add_argument("--print", action="store_true", help="save nothing")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if arguments.missing else {}
    for pod, model, plan in cases():
        name = f"{pod}, {model}, {plan}"
        wanted = not arguments.only or name.startswith(tuple(arguments.only))
        if wanted and "memory" not in known.get(name, {}):
            row = measure(MODELS[model], PODS[pod], plan)
            print(name, json.dumps(row), flush=True)
            if not arguments.print:
                save(name, row)


def save(name: str, row: dict[str, Any]) -> None:
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    names = [", ".join(case) for case in cases()]
    rows = dict(sorted((rows | {name: row}).items(), key=lambda item: names.index(item[0])))
    packages = ("jax", "optax", "libtpu", "jax-cuda12-pjrt")
    about = describe_machine("benchmarks.pods", packages)
    about["command"] = "python -m benchmarks.pods"  # rows may come from several runs
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
