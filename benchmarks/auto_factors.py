"""How much the factors inside ``nag_auto`` matter: each changed by itself, on the tasks of auto.py.

``python -m benchmarks.auto_factors`` takes ten minutes on one core. It writes
results/auto_factors.json and the table in README.md; ``python -m benchmarks.tables`` only writes
the table again.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import auto, candidates
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source, write_section
from nag_jax.methods import nag_auto

RESULT = Path(__file__).parent / "results" / "auto_factors.json"
FACTORS = {"_SHARE": "share", "_MOST": "most", "_GROWTH": "growth", "_PACE": "pace"}
CHANGES: list[dict[str, float]] = [
    {},
    *({"_SHARE": value} for value in (0.15, 0.25)),
    *({"_MOST": value} for value in (0.35, 0.7)),
    *({"_GROWTH": value} for value in (2.0, 6.0)),
    *({"_PACE": value} for value in (7.0, 14.0)),
]


def measure(task: str, change: dict[str, float]) -> list[float]:
    """Test accuracy of each seed, in percent."""
    with mock.patch.dict(vars(nag_auto), change):  # while it is compiled
        trainer = auto.Trainer(task, candidates.METHODS["nag_auto"])
        seeds = auto.default_seeds(task, "nag_auto")
        return [round(trainer.run(seed, {})["accuracy"], 2) for seed in seeds]


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        means = [f"{np.mean(row[task]):.2f}" for task in auto.PROBLEMS]
        worst = [f"{min(row[task]):.2f}" for task in auto.PROBLEMS]
        change = ", ".join(f"{FACTORS[name]} {value:g}" for name, value in row["change"].items())
        cells = [f"{mean} ({low})" for mean, low in zip(means, worst, strict=True)]
        rows.append([change or "as it is", *cells])
    return f"{source(result)}\n\n{markdown(['changed', *auto.PROBLEMS], rows)}"


def main() -> None:
    rows = []
    for change in CHANGES:
        row: dict[str, Any] = {"change": change}
        for task in auto.PROBLEMS:
            row[task] = measure(task, change)
        rows.append(row)
        print(row, flush=True)
    defaults = {name: getattr(nag_auto, name) for name in FACTORS}
    about = describe_machine("benchmarks.auto_factors", ("jax", "optax", "flax"))
    result = about | {"defaults": defaults, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_section("auto_factors", table(result))


if __name__ == "__main__":
    main()
