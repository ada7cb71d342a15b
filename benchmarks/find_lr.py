"""Compares what ``--config.find_lr=True`` suggests with the learning rates of the recipes.

``python -m benchmarks.find_lr`` writes benchmarks/results/find_lr.json.
"""

import json
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks.machine import describe_machine
from examples.trainer.loop.lr_finder import find_learning_rate

RESULTS = Path(__file__).parent / "results" / "find_lr.json"


def main() -> None:
    rows = {}
    for name in ("mlp", "cnn", "rnn"):
        config = import_module(f"configs.{name}").get_config()
        config.find_lr = True
        with tempfile.TemporaryDirectory() as folder:
            found = find_learning_rate(config, Path(folder))
        rows[name] = {"suggestion": found["suggestion"], "configured": config.learning_rate}
    about = describe_machine("benchmarks.find_lr", ("jax", "flax", "optax"))
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
