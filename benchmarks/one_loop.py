"""Whether XLA on CPU can update parameters and momentum in one loop, and what that would save.

    python -m benchmarks.one_loop

Written from the new buffer, as the kernel does it, the update needs a loop after the buffer's.
Written from the old one the two loops read the same arrays, and an experimental flag makes XLA
merge such loops. Each round starts a process without the flag and one with it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nag_jax
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source

RESULTS = Path(__file__).parent / "results" / "one_loop.json"
FLAG = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
SHAPE = 5000, 4000
RATE, MOMENTUM = 0.1, 0.9
ROUNDS, STEPS = 5, 20


def from_old_buffer(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    """What ``nag`` computes, but no output of it is an input of another."""
    del params
    mix = lambda a, b: jax.tree.map(lambda m, g: a * m - b * RATE * g, state, updates)
    return mix(MOMENTUM**2, 1 + MOMENTUM), mix(MOMENTUM, 1)


FORMS: dict[str, Callable[[], Any]] = {
    "optax.sgd(nesterov=True)": lambda: optax.sgd(RATE, MOMENTUM, nesterov=True),
    "nag, from the new buffer": lambda: nag_jax.nag(RATE, MOMENTUM),
    "from the old buffer": lambda: optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), from_old_buffer
    ),
}


def measure() -> dict[str, tuple[float, int]]:
    """Median ms of a jitted, donated step and its loops over the leaf, copies among them."""
    gradients = jnp.full(SHAPE, 0.5)
    found = {}
    for name, make in FORMS.items():
        optimizer = make()
        params = jnp.zeros(SHAPE)
        state = optimizer.init(params)

        def step(params: Any, state: Any, gradients: Any, update: Any = optimizer.update) -> Any:
            updates, state = update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
        program = compiled.as_text() or ""
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            params, state = jax.block_until_ready(compiled(params, state, gradients))
            times.append(time.perf_counter() - start)
        entry = program[program.index("ENTRY") :].splitlines()
        large = [line for line in entry if f"f32[{SHAPE[0]},{SHAPE[1]}]" in line]
        loops = sum(" fusion(" in line or " copy(" in line for line in large)
        found[name] = 1e3 * statistics.median(times), loops
    return found


def rounds() -> list[dict[str, Any]]:
    """Rows of form and flag: ms, ratio to optax without the flag in the same round, loops."""
    command = [sys.executable, "-m", "benchmarks.one_loop", "--measure"]
    times: dict[tuple[str, str], list[float]] = {}
    loops = {}
    for _ in range(ROUNDS):
        for flag in ("", FLAG):
            env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
            for form, (ms, count) in json.loads(subprocess.check_output(command, env=env)).items():
                times.setdefault((form, flag), []).append(ms)
                loops[form, flag] = count
    base = times[next(iter(times))]
    return [
        {
            "form": form,
            "flag": flag,
            "ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "loops": loops[form, flag],
        }
        for (form, flag), values in times.items()
    ]


def table(results: dict[str, Any]) -> str:
    rows = [
        [row["form"], "with" if row["flag"] else "without", row["loops"], f"{row['ratio']:.2f}"]
        for row in results["rows"]
    ]
    return f"{source(results)}\n\n" + markdown(["step", "the flag", "loops", "time"], rows, 2)


def main() -> None:
    if "--measure" in sys.argv:
        print(json.dumps(measure()))
        return
    results = describe_machine("benchmarks.one_loop", ("jax", "optax")) | {"rows": rounds()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
