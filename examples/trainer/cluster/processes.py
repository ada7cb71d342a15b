"""Several processes that train one model together, with ``jax.distributed``."""

import faulthandler
import os
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.trainer.errors import UserError


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    detect: bool,
    heartbeat: int,
) -> None:
    """Connects to the other processes; does nothing if no argument asks for it.

    Args:
      coordinator: host:port of process 0, the same for all processes.
      num_processes: the number of processes, at least 1.
      process_id: the number of this process, 0 to num_processes - 1.
      detect: take missing values from SLURM, Kubernetes, MPI or a TPU pod.
      heartbeat: seconds of silence after which a process counts as dead, at least 1.

    Raises:
      UserError: if only some of the first three are given, if one is out of range, or if the
        processes do not find each other.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if not any(given) and not detect:
        return
    if not all(given) and not detect:
        raise UserError(
            "--coordinator=HOST:PORT, --num_processes and --process_id must be given together; "
            "--distributed takes them from SLURM, Kubernetes, MPI or a TPU pod"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must be in [0, {num_processes}) for --num_processes={num_processes}, "
            f"got {process_id}"
        )
    if heartbeat < 1:
        raise UserError(f"--heartbeat must be at least 1 second, got {heartbeat}")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the processes did not find each other: {reason}") from None
    faulthandler.disable()  # jax itself reports a process that lost the others


def lost_the_others(error: BaseException) -> bool:
    """Whether this is the error that jax raises when another process no longer answers."""
    return several() and isinstance(error, jax.errors.JaxRuntimeError)


def is_first() -> bool:
    """Whether this process writes for all: metrics, plots, the terminal."""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def say(line: str) -> None:
    """Prints a line, from one process only."""
    if is_first():
        print(line, flush=True)


def wait_for_all(name: str) -> None:
    """Returns when every process has reached this call."""
    if several():
        multihost_utils.sync_global_devices(name)


def sum_over_all(counts: Any) -> Any:
    """Sums a pytree of whole numbers below 2**64 over all processes, modulo 2**64."""
    if not several():
        return counts
    # In two halves, since jax has no 64-bit integers without x64.
    halves = lambda n: np.array([n % 2**32, n // 2**32], np.uint32)
    leaves, tree = jax.tree.flatten(counts)
    every = multihost_utils.process_allgather(np.array([halves(n) for n in leaves], np.uint32))
    totals = np.asarray(every, np.uint64).sum(axis=0).reshape(-1, 2)
    return tree.unflatten([(int(low) + 2**32 * int(high)) % 2**64 for low, high in totals])


def all_have(value: int) -> bool:
    """Whether all processes have this number; if not, at least one of them gets False."""
    return sum_over_all(value) == value * jax.process_count() % 2**64


def end_at_once(message: str) -> NoReturn:
    """Ends one of several processes with code 1; a normal exit would wait for the others."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
