"""Memory traffic of an optimizer's step on a TPU v5e and an H100, from the compiled programs.

    pip install -e '.[chips]' && python -m benchmarks.chips [--only nag fista] [--print]

JAX's compilers for both chips work on a machine that has none. Each step is jitted and donated,
takes its gradients as an argument and is compiled for one chip; the compiled program shows how
many bytes it moves, in how many kernels, with which temporary arrays and copies. Nothing is run, so
its time is unknown.

On a TPU the bytes are the compiler's own count. It counts twice what passes through the memory on
the chip (128 MB on v5e), so the limit is that of the large leaf, and for other trees
``optax.sgd`` on the same tree is the unit. On an H100 each kernel of the entry computation reads
its operands and writes its results.

jax 0.12 needs nothing else. Before that, jax looks for an attached GPU when it lowers for CUDA, in
a private function that :func:`devices` replaces; nothing outside of this file does that.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this is not a TPU machine: do not look for one
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nag_jax
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source
from benchmarks.shapes import SHAPES
from nag_jax import proximal, restart, rules

RESULTS = Path(__file__).parent / "results" / "chips.json"
CHIPS = {"v5e": "TPU v5e", "h100": "H100"}
TREES: dict[str, list[tuple[int, ...]]] = {
    "one leaf of 134 M": [(32768, 4096)],
    **{name: SHAPES[name] for name in ("500 of 64 x 64", "ResNet-50", "GPT-2 small")},
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")  # not kernels
SIZES = dict(s4=0.5, u4=0.5, pred=1, s8=1, u8=1, f8e4m3fn=1, f8e5m2=1, s16=2, u16=2, f16=2, bf16=2,
    s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8, c128=16)  # fmt: skip


class Program(NamedTuple):
    """A compiled step; bytes are per parameter."""

    moved: float
    temporaries: float
    operations: int
    copies: int  # of arrays of at least a thousandth of the parameters
    collectives: int


@functools.cache
def devices(chip: str, **topology: Any) -> list[Any]:
    """Devices to compile for: eight chips, or those of ``topology``.

    Raises:
      RuntimeError: if the compiler's packages are not installed.
    """
    try:
        if chip == "v5e":
            wanted = {"platform": "tpu", "topology_name": "v5e:2x4"} | topology
            return topologies.get_topology_desc(**wanted).devices
        if jax.__version_info__ < (0, 12):
            from jax._src import xla_bridge

            usual = xla_bridge.canonicalize_platform
            gpu = {"cuda": "cuda", "gpu": "cuda"}
            xla_bridge.canonicalize_platform = lambda name: gpu.get(name) or usual(name)
        wanted = {"topology": "1x1x8", "target_config": H100} | topology
        return topologies.get_topology_desc("h100", "cuda", **wanted).devices
    except Exception as error:
        raise RuntimeError(f"cannot compile for {chip}; pip install -e '.[chips]'") from error


def options(chip: str) -> dict[str, Any] | None:
    """Compiler options: without a CUDA device, kernels cannot be tuned."""
    if chip == "v5e":
        return None
    packages = list(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cuda_nvcc"))
    if not packages:
        raise RuntimeError("cannot compile for h100; pip install -e '.[chips]'")
    return {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_cuda_data_dir": str(packages[0]),
    }


def compile_for(chip: str, function: Callable[..., Any], *trees: Any, donate: int = 0) -> Any:
    """``function`` of arrays like those of ``trees``, the first ``donate`` donated, on one chip."""
    whole = NamedSharding(Mesh(np.array(devices(chip)[:1]), ("one",)), PartitionSpec())
    on_chip = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    jitted = jax.jit(function, donate_argnums=tuple(range(donate)))
    return jitted.lower(*jax.tree.map(on_chip, trees)).compile(compiler_options=options(chip))


def compile_step(
    chip: str, optimizer: optax.GradientTransformation, params: Any, **extra: Any
) -> Any:
    """The donated update of ``params``, a tree of ``ShapeDtypeStruct``, with gradients given."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    gradients = params.fast if isinstance(params, optax.LookaheadParams) else params
    return compile_for(chip, step, params, jax.eval_shape(optimizer.init, params), gradients,
        donate=2)  # fmt: skip


def read(compiled: Any, parameters: int) -> Program:
    """What the compiled program of a step of so many parameters does."""
    text = compiled.as_text()
    entry = kernels(computation(text))
    cost = compiled.cost_analysis() or {}
    large = parameters * 4 // 1000
    copied = re.findall(r" = (\(?\w+\[[^=]*?) (?:copy|copy-start)\(", text)
    collectives = r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)[\w-]*\("
    return Program(
        moved=cost.get("bytes accessed", float(sum(moved for _, moved in entry))) / parameters,
        temporaries=compiled.memory_analysis().temp_size_in_bytes / parameters,
        operations=len(entry),
        copies=sum(size_of(shape) >= large for shape in copied),
        collectives=len(re.findall(collectives, text)),
    )


def moved_without_branch(compiled: Any, parameters: int) -> float:
    """Bytes a parameter of a program with one condition, where that does not hold."""
    text = compiled.as_text()
    names = r"false_computation=%?([\w.\-]+)|branch_computations=\{%?([\w.\-]+)"
    ((first, second),) = re.findall(names, computation(text))
    branch = kernels(computation(text, first or second))
    entry = [kernel for kernel in kernels(computation(text)) if kernel[0] != "conditional"]
    return sum(moved for _, moved in entry + branch) / parameters


def computation(text: str, name: str | None = None) -> str:
    """The lines of a computation of a compiled program, by default of the one that runs first."""
    start = "ENTRY " if name is None else f"%?{re.escape(name)} "
    found = re.search(rf"^{start}[^\n]*\{{\n(.*?)^\}}", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def kernels(body: str) -> list[tuple[str, float]]:
    """The kind of each kernel of a computation, and the bytes of its operands and results."""
    sizes: dict[str, float] = {}
    found = []
    pattern = r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)"
    for match in filter(None, (re.match(pattern, line) for line in body.splitlines())):
        name, shape, kind, rest = match.groups()
        sizes[name] = size_of(shape)
        if kind not in FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            moved = sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
            found.append((kind, moved))
    return found


def size_of(shape: str) -> float:
    """Bytes of the arrays in a shape as HLO writes it."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(SIZES[dtype] * math.prod(int(n) for n in lengths.split(",") if n)
               for dtype, lengths in arrays if dtype in SIZES)  # fmt: skip


class Case(NamedTuple):
    """An optimizer, and the bytes that any program must move for each parameter."""

    optimizer: Any
    least: float
    params: Any = jnp.float32
    extra: dict[str, Any] = {}  # noqa: RUF012  # never changed


def accelerated(rule: rules.Rule, **kwargs: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale(-0.1), nag_jax.accelerate(rule, **kwargs))


def cases() -> dict[str, Case]:
    """Every public optimizer, storage and kind of rule, and what they compete with."""
    nag = functools.partial(nag_jax.nag, 0.1, 0.9)
    halving = optax.exponential_decay(0.1, 100, 0.5)
    value = {"value": jnp.float32(0)}
    search = {**value, "value_fn": lambda params: jnp.float32(0)}
    inner = {"sync": False}
    return {
        "optax.sgd, nesterov": Case(optax.sgd(0.1, 0.9, nesterov=True), 20),
        "optax.adam": Case(optax.adam(1e-3), 28),
        "optax.contrib.schedule_free_sgd": Case(optax.contrib.schedule_free_sgd(0.1), 20),
        "optax.contrib.prodigy": Case(optax.contrib.prodigy(), 44),
        "optax.lookahead(sgd)": Case(optax.lookahead(optax.sgd(0.1), 5, 0.5), 12),
        "nag": Case(nag(), 20),
        "nag, scheduled": Case(nag_jax.nag(halving, nag_jax.schedules.convex()), 20),
        "nag, sutskever": Case(nag(convention="sutskever"), 20),
        "nag, weight decay": Case(nag(weight_decay=1e-4), 20),
        "nag, decoupled decay": Case(nag(weight_decay=1e-4, decay="decoupled"), 20),
        "nag_then_sgd": Case(nag_jax.nag_then_sgd(0.1, 0.9, switch_step=100), 20),
        "nag, stochastic_bfloat16": Case(
            nag(accumulator_dtype=nag_jax.stochastic_bfloat16()), 16),
        "nag, int8_blocks": Case(
            nag(accumulator_dtype=nag_jax.int8_blocks()), 19),  # g and m are read for scales first
        "nag, stochastic_rounding of bfloat16 params": Case(
            optax.chain(nag(), nag_jax.stochastic_rounding()), 10, jnp.bfloat16),
        "fista": Case(nag_jax.fista(0.1, restart=None), 20),
        "fista, l1": Case(nag_jax.fista(0.1, proximal.l1(0.1), restart=None), 20),
        "fista, restart gradient": Case(accelerated(rules.fista(), restart=restart.gradient), 20),
        "fista, restart speed": Case(accelerated(rules.fista(), restart=restart.speed), 20),
        "fista, restart value": Case(
            accelerated(rules.fista(), restart=restart.value), 20, extra=value),
        "ogm, restart gradient": Case(nag_jax.ogm(0.1), 20),
        "tmm": Case(nag_jax.tmm(0.1, 0.01), 20),
        "pogm, l1": Case(nag_jax.pogm(0.1, proximal.l1(0.1), horizon=100), 20),
        "optista, l1": Case(nag_jax.optista(0.1, proximal.l1(0.1), horizon=100), 20),
        # These three cannot move anything before they know sums over whole arrays. Their first pass
        # reads gradients, params and momentum for the test of the step and the restart;
        "backtracking": Case(nag_jax.backtracking(), 12 + 20, extra=search),
        # gradients, the last gradients and momentum for the curvature that bounds this step;
        "adanag": Case(nag_jax.adanag(), 12 + 24, extra=value),
        # gradients for their norm (the other sums could be made for the next step in the second).
        "nag_auto": Case(nag_jax.nag_auto(), 4 + 32),
        "averaged(nag)": Case(nag_jax.averaged(nag()), 28),
        "lookahead(sgd), inner step": Case(nag_jax.lookahead(optax.sgd(0.1)), 12, extra=inner),
        "snoo(sgd), inner step": Case(nag_jax.snoo(optax.sgd(0.1)), 12, extra=inner),
        "snoo(adam), inner step": Case(nag_jax.snoo(optax.adam(0.1)), 28, extra=inner),
        "snoo(nag), inner step": Case(nag_jax.snoo(nag()), 20, extra=inner),
        "snoo(sgd), whole program": Case(nag_jax.snoo(optax.sgd(0.1)), 12),
        **{f"rules.{name}": Case(accelerated(rule), 20) for name, rule in RULES.items()},
    }  # fmt: skip


RULES = {
    "nesterov": rules.nesterov(0.9),
    "nesterov, scheduled": rules.nesterov(nag_jax.schedules.convex()),
    "chambolle_dossal": rules.chambolle_dossal(),
    "strongly_convex": rules.strongly_convex(0.01),
    "estimate_sequence": rules.estimate_sequence(0.1, 0.1),
    "ogm": rules.ogm(),
    "ogm_g": rules.ogm_g(100),
    "item": rules.item(0.01),
    "sc_ogm": rules.sc_ogm(0.01),
    "lessard": rules.lessard(1.0, 0.5, 0.3),
    "robust_momentum": rules.robust_momentum(0.01, 0.5),
    "heavy_ball": rules.heavy_ball(0.9),
    "qhm": rules.qhm(),
    "gpa": rules.gpa(),
    "agnes": rules.agnes(0.9, 0.1),
    "ema_nesterov": rules.ema_nesterov(0.99, nag_jax.schedules.convex()),
    "mass": rules.mass(),
    "accsgd": rules.accsgd(),
    "srsgd": rules.srsgd(40),
}


# Measured on every tree, which takes the TPU's compiler a minute for hundreds of leaves.
ON_EVERY_TREE = (
    "optax.sgd, nesterov",
    "optax.adam",
    "nag",
    "nag, stochastic_bfloat16",
    "nag, int8_blocks",
    "fista, restart gradient",
    "averaged(nag)",
    "adanag",
)


def measure(case: Case, chip: str, shapes: list[tuple[int, ...]]) -> Program:
    """The program of one step over parameters of these shapes."""
    params: Any = [jax.ShapeDtypeStruct(shape, case.params) for shape in shapes]
    parameters = sum(p.size for p in params)
    if isinstance(jax.eval_shape(case.optimizer.init, params), optax.LookaheadState):
        params = optax.LookaheadParams(params, params)
    return read(compile_step(chip, case.optimizer, params, **case.extra), parameters)


def table(result: dict[str, Any]) -> str:
    """Bytes a parameter on the large leaf, and relative to optax's on other trees."""
    head = ["step", "least"]
    for chip in CHIPS.values():
        head += [f"{chip}: bytes", "temporaries", *(f"{tree}, to optax" for tree in TREES if
                 tree != "one leaf of 134 M")]  # fmt: skip
    head.append("H100: kernels for 500 leaves")
    first, *others = TREES
    rows = []
    for name, row in result["rows"].items():
        cells: list[str] = []
        for chip in CHIPS:
            found, unit = row[chip], result["rows"]["optax.sgd, nesterov"][chip]
            cells += [f"{found[first]['moved']:.2f}", f"{found[first]['temporaries']:.2f}"]
            for tree in others:
                near = found[tree]["moved"] / unit[tree]["moved"] if tree in found else None
                cells.append("" if near is None else f"{near:.2f}")
        many = row["h100"].get("500 of 64 x 64")
        cells.append(str(many["operations"]) if many else "")
        rows.append([name, f"{row['least']:g}", *cells])
    return f"{source(result)}\n\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step moves on a TPU v5e and an H100.")
    parser.add_argument("--only", nargs="*", help="beginnings of names")
    parser.add_argument("--large", action="store_true", help="the large leaf only; saves nothing")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    chosen = {
        name: case
        for name, case in cases().items()
        if not arguments.only or name.startswith(tuple(arguments.only))
    }
    for name, case in chosen.items():
        row: dict[str, Any] = {"least": case.least}
        for chip in CHIPS:
            row[chip] = {}
            for tree, shapes in TREES.items():
                everywhere = name in ON_EVERY_TREE and not arguments.large
                if everywhere or tree == next(iter(TREES)):
                    row[chip][tree] = measure(case, chip, shapes)._asdict()
            programs = row[chip].values()
            print(f"{name:44} least {case.least:4.1f} {chip:5}", *(
                f"{p['moved']:8.2f} B in {p['operations']:4} ops, temporaries "
                f"{p['temporaries']:5.2f}, copies {p['copies']}" for p in programs),
                sep=" | ", flush=True)  # fmt: skip
        rows[name] = row
    if not arguments.large:
        packages = ("jax", "optax", "libtpu", "jax-cuda12-pjrt")
        about = describe_machine("benchmarks.chips", packages)
        RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
