"""The origin of the results in a file, and the environment of runs in parallel."""

import os
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import version
from typing import Any

# Two runs in parallel, each on one thread, are faster than one after the other on two threads.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "PJRT_NPROC": "1",
    "JAX_PLATFORMS": "cpu",
}


def describe_machine(module: str, packages: tuple[str, ...] = ("jax", "optax")) -> dict[str, Any]:
    """Command, date, machine and versions of the run that calls this."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
