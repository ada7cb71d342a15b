"""The table of ``examples.trainer.diloco`` as a result file: ``python -m benchmarks.diloco``.

Writes benchmarks/results/diloco.json.
"""

import json
import time
from pathlib import Path

from benchmarks.machine import describe_machine
from configs import diloco as recipe
from examples.trainer.diloco import workers

_RESULT = Path(__file__).parent / "results" / "diloco.json"


def main() -> None:
    config, start = recipe.get_config(), time.perf_counter()
    rows = workers.table(config)
    result = describe_machine("benchmarks.diloco", ("jax", "optax", "flax"))
    result |= {"config": config.to_dict(), "results": [row._asdict() for row in rows]}
    result["seconds"] = round(time.perf_counter() - start)
    _RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
