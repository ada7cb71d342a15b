"""Trains the recipes of configs/ as in examples/trainer/README.md, and saves the results.

``python -m benchmarks.recipes [--only mlp linear ...]`` runs each command with each of its seeds in
a new folder and a new process, one after the other, and replaces its row in results/recipes.json;
``python -m benchmarks.tables`` makes the table in examples/trainer/README.md from it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine
from benchmarks.readme import markdown

RESULTS = Path(__file__).parent / "results" / "recipes.json"
METRICS = {"test_accuracy": ("accuracy {} %", 2), "test_perplexity": ("perplexity {}", 2)}
METRICS |= {"test_r2": ("R2 {}", 3)}


class Recipe(NamedTuple):
    options: str
    seeds: tuple[int, ...] = (0,)


_PLAIN = "--config.augment.flip=False --config.augment.shift=0 --config.augment.zoom=0.0"
_IMAGES = "--config.dataset=fashion_mnist --config.num_epochs=12"
RECIPES = {
    "mlp": Recipe("--config=configs/mlp.py", (0, 1, 2)),
    "mlp, images": Recipe(f"--config=configs/mlp.py {_IMAGES}", (0, 1, 2)),
    "linear": Recipe("--config=configs/linear.py"),
    "cnn": Recipe("--config=configs/cnn.py"),
    "cnn, plain": Recipe(f"--config=configs/cnn.py {_PLAIN} --config.num_epochs=8"),
    "resnet": Recipe("--config=configs/resnet.py"),
    "rnn": Recipe("--config=configs/rnn.py"),
    "transformer": Recipe("--config=configs/transformer.py"),
    "gan": Recipe("--config=configs/gan.py"),
    "regression": Recipe("--config=configs/regression.py"),
}


def train(options: str, seed: int) -> dict[str, Any]:
    """The last row of the run's log, and the seconds of its command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.trainer", *options.split()]
        command += [f"--config.seed={seed}", f"--workdir={folder}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return summary(Path(folder), seed, seconds)


def summary(folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {k: v for k, v in rows[-1].items() if k.startswith(("step", "test_", "train_"))}
    return {"seed": seed, "seconds": round(seconds), "last_row": last}


def table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["recipes"].values():
        runs, also = row["runs"], row["also_ran"]
        last = runs[0]["last_row"]
        result = "see `progress` in its folder: shapes of clothes, still noisy"
        for name, (text, digits) in METRICS.items():
            if name in last:
                values = ", ".join(f"{run['last_row'][name]:.{digits}f}" for run in runs)
                result = text.format(values)
        longest = max(run["seconds"] for run in runs)
        wall = f"{longest} s" if longest < 120 else f"{longest / 60:.1f} min"
        rows.append(
            [f"`{row['options']}`", last["step"], result, wall + "*" * bool(also), row["date"]]
        )
    head = [
        "`python -m examples.trainer --workdir=FOLDER` with",
        "steps",
        "test",
        "wall time",
        "date",
    ]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the recipes of the examples.")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--also_ran", default="", help="for the result file: what else ran")
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text())["recipes"] if RESULTS.exists() else {}
    for name in arguments.only:
        recipe = RECIPES[name]
        runs = [train(recipe.options, seed) for seed in recipe.seeds]
        about = describe_machine("benchmarks.recipes", ("jax", "flax", "optax"))
        found[name] = about | {"also_ran": arguments.also_ran, "options": recipe.options}
        found[name]["runs"] = runs
        print(name, runs, flush=True)
        found = {key: found[key] for key in RECIPES if key in found}
        RESULTS.write_text(json.dumps({"recipes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
