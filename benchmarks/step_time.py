"""Time of one optimizer step, update and apply, compared with optax and PyTorch, on CPU or GPU.

    python -m benchmarks.step_time [--shapes "one leaf of 20 M" ...] [--rounds 15] [--table]

A step is jitted, its params and state donated; gradients are given. The contestants take turns in
random order, several steps a turn. All are built again three times, in random order, since the
place of arrays in memory changes the time of thousands of small ones. Optax takes part twice,
and a ratio is the median over the rounds of the quotient with the mean of the two in the same
round: their own ratios show the resolution of the measurement. Results of the shapes
that were run replace those in results/step_time.json; --table prints them without running
anything. Fewer tiny leaves than 2,000 are also measured, for how the cost of a leaf grows.
"""

import argparse
import importlib.util
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown
from benchmarks.shapes import FEWER, SHAPES, Shapes
from nag_jax import restart, rules

RESULTS = Path(__file__).parent / "results" / "step_time.json"
BASE, AGAIN = "optax.sgd(nesterov=True)", "the same once more"
BUILDS = 3
LEAVES_TO_COMPILE = 200  # torch.compile takes minutes for many small leaves


def accelerated(rule: Any, **options: Any) -> optax.GradientTransformation:
    return optax.chain(optax.sgd(0.1), nag_jax.accelerate(rule, **options))


def stored(storage: Any) -> optax.GradientTransformation:
    return nag_jax.nag(0.1, 0.9, accumulator_dtype=storage)


EVERYWHERE = {
    BASE: lambda: optax.sgd(0.1, 0.9, nesterov=True),
    AGAIN: lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "nag": lambda: nag_jax.nag(0.1, 0.9),
    "nag, sutskever": lambda: nag_jax.nag(0.1, 0.9, convention="sutskever"),
    "nag, bfloat16 nearest": lambda: stored(jnp.bfloat16),
    "nag, stochastic_bfloat16": lambda: stored(nag_jax.stochastic_bfloat16()),
    "nag, int8_blocks": lambda: stored(nag_jax.int8_blocks()),
    "fista with restart": lambda: accelerated(rules.fista(), restart=restart.gradient),
}
RULES = {
    "fista": lambda: accelerated(rules.fista()),
    "strongly_convex": lambda: accelerated(rules.strongly_convex(0.01)),
    "tmm": lambda: accelerated(rules.tmm(0.01)),
    "robust_momentum": lambda: accelerated(rules.robust_momentum(0.01, 0.5)),
    "sc_ogm": lambda: accelerated(rules.sc_ogm(0.01)),
    "heavy_ball": lambda: accelerated(rules.heavy_ball(0.9)),
    "qhm": lambda: accelerated(rules.qhm()),
    "gpa": lambda: accelerated(rules.gpa()),
}
COMPILED = BASE, "nag", "nag, stochastic_bfloat16", "nag, int8_blocks", "fista with restart"


class Program:
    """A jitted step with its arrays, and how long tracing and compiling it took."""

    def __init__(self, make: Callable[[], Any], shapes: Shapes, gradients: Any):
        optimizer = make()
        self.gradients = gradients
        params = [jnp.zeros(shape) for shape in shapes]
        state = optimizer.init(params)

        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients)
        self.trace_s = time.perf_counter() - start
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start - self.trace_s
        self.arrays = params, state

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.arrays = self.compiled(*self.arrays, self.gradients)
        jax.block_until_ready(self.arrays)


def copy_program(size: int) -> Callable[[int], None]:
    """Reads and writes ``size`` float32 numbers."""
    negate = jax.jit(jnp.negative, donate_argnums=0)
    box = [jnp.ones(size)]

    def run(steps: int) -> None:
        for _ in range(steps):
            box[0] = negate(box[0])
        box[0].block_until_ready()

    return run


def torch_programs(shapes: Shapes) -> tuple[dict[str, Callable[[int], None]], str]:
    """PyTorch's SGD in the three ways, and a word on what could not be run."""
    if importlib.util.find_spec("torch") is None:
        return {}, "torch is not installed"
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    note = ""

    def program(compiled: bool = False, **options: Any) -> Callable[[int], None]:
        params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **options)
        step = torch.compile(optimizer.step) if compiled else optimizer.step

        def run(steps: int) -> None:
            for _ in range(steps):
                step()
            if device == "cuda":
                torch.cuda.synchronize()

        run(2)
        return run

    programs = {"torch foreach": program(foreach=True), "torch fused": program(fused=True)}
    if len(shapes) > LEAVES_TO_COMPILE:
        note = f"torch.compile is left out above {LEAVES_TO_COMPILE} leaves"
    elif device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        note = "torch.compile needs a C++ compiler, and there is none"
    else:
        try:
            programs["torch compiled"] = program(compiled=True, foreach=True)
        except Exception as error:
            note = f"torch.compile failed: {type(error).__name__}"
    return programs, note


def steps_a_turn(run: Callable[[int], None]) -> int:
    run(2)
    start = time.perf_counter()
    run(2)
    return max(1, min(200, round(0.1 / ((time.perf_counter() - start) / 2))))


def measure(name: str, rounds: int) -> dict[str, Any]:
    shapes = (SHAPES | FEWER)[name]
    size = sum(math.prod(shape) for shape in shapes)
    gradients = [jnp.full(shape, 0.5) for shape in shapes]
    makers = EVERYWHERE | (RULES if len(shapes) == 1 else {})
    theirs, note = torch_programs(shapes)
    order = random.Random(0)
    ours: dict[str, Program] = {}
    times: dict[str, list[float]] = {}
    waits: dict[str, list[tuple[float, float]]] = {}
    for _ in range(BUILDS):
        ours.clear()
        for key in order.sample(list(makers), len(makers)):
            program = ours[key] = Program(makers[key], shapes, gradients)
            waits.setdefault(key, []).append((program.trace_s, program.compile_s))
        # A copy must not fit into a cache that the steps do not fit into, and may where they do.
        contestants = {"copy": copy_program(size)} | {key: ours[key] for key in makers} | theirs
        steps = {key: steps_a_turn(run) for key, run in contestants.items()}
        for _ in range(-(-rounds // BUILDS)):
            for key in order.sample(list(contestants), len(contestants)):
                start = time.perf_counter()
                contestants[key](steps[key])
                took = (time.perf_counter() - start) / steps[key]
                times.setdefault(key, []).append(took)
    times = {key: times[key] for key in ["copy", *makers, *theirs]}
    base = (np.array(times[BASE]) + np.array(times[AGAIN])) / 2
    rows = {}
    for key, values in times.items():
        ratios = np.array(values) / base
        rows[key] = {
            "ms": 1e3 * statistics.median(values),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        }
        if key in ours:
            trace_s, compile_s = (statistics.median(each) for each in zip(*waits[key], strict=True))
            rows[key] |= {"trace_s": trace_s, "compile_s": compile_s}
            analysis = ours[key].compiled.memory_analysis()
            rows[key]["temporary_bytes"] = getattr(analysis, "temp_size_in_bytes", None)
    copy_rate = 8 * size / statistics.median(times["copy"])
    for row in rows.values():  # params, gradients and buffer read, params and buffer written
        row["share_of_copy_rate"] = 20 * size / (row["ms"] / 1e3) / copy_rate
    rows["copy"] = {"ms": rows["copy"]["ms"], "GB_per_s": copy_rate / 1e9}
    return {"leaves": len(shapes), "parameters": size, "rounds": len(base), "note": note,
            "device": jax.devices()[0].device_kind, "rows": rows}  # fmt: skip


def import_times(runs: int = 5) -> dict[str, float]:
    """Seconds, each in a separate process: jax and optax, and nag_jax after them."""
    code = ("import time; a = time.perf_counter(); import jax; b = time.perf_counter(); "
            "import optax; c = time.perf_counter(); import nag_jax; d = time.perf_counter(); "
            "print(b - a, c - b, d - c)")  # fmt: skip
    rows = [
        [float(x) for x in subprocess.check_output([sys.executable, "-c", code]).split()]
        for _ in range(runs)
    ]
    medians = np.median(np.array(rows), 0)
    return dict(zip(("jax", "optax", "nag_jax"), (float(m) for m in medians), strict=True))


def table(result: dict[str, Any]) -> str:
    """Ratios in Markdown, one column for each shape that was run."""
    shapes = {name: result["shapes"][name] for name in SHAPES if name in result["shapes"]}
    keys = dict.fromkeys(key for shape in shapes.values() for key in shape["rows"])
    lines = [
        "| step | " + " | ".join(shapes) + " |",
        "|---|" + "---:|" * len(shapes),
    ]
    for key in keys:
        cells = []
        for shape in shapes.values():
            row = shape["rows"].get(key)
            if row is None:
                cells.append("")
            elif "ratio" not in row:
                cells.append(f"{row['GB_per_s']:.1f} GB/s")
            elif key == BASE:
                cells.append(f"{row['ratio']:.2f} ({row['ms']:.2f} ms)")
            else:
                cells.append(f"{row['ratio']:.2f}")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    for key in COMPILED:
        cells = [f"{s['rows'][key]['trace_s']:.2f} + {s['rows'][key]['compile_s']:.2f} s"
                 for s in shapes.values()]  # fmt: skip
        lines.append(f"| trace + compile, {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(result: dict[str, Any]) -> str:
    """What a leaf costs among more and more of them, in Markdown."""
    shapes = [result["shapes"][name] for name in (*FEWER, list(SHAPES)[-1])]
    costs = {"µs to step": "ms", "ms to trace": "trace_s", "ms to compile": "compile_s"}
    counts = [f"{s['leaves']:,}" for s in shapes]
    head = [n if i else f"{cost}, n = {n}" for cost in costs for i, n in enumerate(counts)]
    rows = [
        [key, *(f"{1e3 * s['rows'][key][name] / s['leaves']:.2f}"
                for name in costs.values() for s in shapes)]
        for key in COMPILED
    ]  # fmt: skip
    return markdown(["each of n tiny leaves", *head], rows)


def main() -> None:
    names = [*SHAPES, *FEWER]
    parser = argparse.ArgumentParser(description="The time of one optimizer step.")
    parser.add_argument("--shapes", nargs="*", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"shapes": {}}
    if not arguments.table:
        packages = ("jax", "optax", *(["torch"] if importlib.util.find_spec("torch") else []))
        result |= describe_machine("benchmarks.step_time", packages)
        for name in arguments.shapes:
            result["shapes"][name] = measure(name, arguments.rounds)
            jax.clear_caches()
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        result["import_s"] = import_times()
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(growth(result) if FEWER.keys() <= result["shapes"].keys() else "")
    print(result["import_s"], [s["note"] for s in result["shapes"].values()])


if __name__ == "__main__":
    main()
