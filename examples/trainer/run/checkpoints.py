"""Checkpoints with orbax: the whole state of a run in one atomic, asynchronous step."""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError


class Restored(NamedTuple):
    """A checkpoint: its state like the template, and what was saved beside it."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The newest ``keep`` checkpoints in ``folder``, one subfolder each, named by the step."""

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder.absolute(), keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Barriers of their own: threads of two managers would meet at each other's.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self._folder.name)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, multiprocessing_options=barriers
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # orbax overlooks a file in its place
            return _Manager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be used: {error.strerror}") from None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to write; returns once the next update may change the state."""
        leaves = _named(state)
        sealed = {"meta": meta, "checksums": _checksums(leaves)}
        sealed["checksum"] = _json_checksum(sealed)
        # A copy: donated buffers may be overwritten while they are still being written to disk.
        arrays = {name: _copy(leaf) for name, leaf in leaves.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(sealed)
        )
        self._guarded(step, lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._guarded(self._manager.latest_step(), self._manager.wait_until_finished)

    def close(self) -> None:
        self._guarded(self._manager.latest_step(), self._manager.close)

    def _guarded(self, step: int | None, action: Any) -> None:
        try:
            done = action()
        except Exception as error:  # orbax and tensorstore raise many kinds
            if processes.lost_the_others(error):
                raise
            reason = _why_not_written(error)
            raise UserError(f"{self._folder}/{step}: could not be written: {reason}") from None
        if done is False:
            raise UserError(f"{self._folder}/{step}: was not written: it or a later one exists")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(
        self, template: Any, accept: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored | None:
        """The newest checkpoint that can be read; those that cannot are set aside.

        Args:
          template: a state of the wanted shapes, dtypes and shardings.
          accept: gets what was saved beside the state, before that is read; raises UserError to
            refuse it.

        Returns:
          None where there is no checkpoint.

        Raises:
          UserError: if there are some, but none can be read.
        """
        steps, reasons = self.steps(), []
        for step in steps:
            try:
                meta, checksums = self._read_meta(step)
                accept(meta)
                restored = Restored(step, self._read_state(step, template, checksums), meta)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes orbax raise
                reasons.append(f"{self._folder}/{step}: damaged ({_first_line(error)})")
                processes.say(f"{reasons[-1]}; trying the one before")
                continue
            self.set_aside(s for s in steps if s > step)
            return restored
        if reasons:
            raise UserError(f"no checkpoint can be read; {reasons[0]}")
        return None

    def _read_meta(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        meta_only = ocp.args.Composite(meta=ocp.args.JsonRestore())
        sealed = self._manager.restore(step, args=meta_only)["meta"]
        checksum = sealed.pop("checksum")
        if checksum != _json_checksum(sealed):
            raise ValueError("the checksum of meta is wrong")
        return sealed["meta"], sealed["checksums"]

    def _read_state(self, step: int, template: Any, checksums: dict[str, int]) -> Any:
        names = _named(template)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in names.items()
        }
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=items)["state"]
        for name, checksum in _checksums(arrays).items():  # orbax and zstd check no values
            if checksums[name] != checksum:
                raise ValueError(f"the checksum of {name} is wrong")
        # Copied: what orbax returns cannot always be donated.
        leaves = [jnp.copy(arrays[name]) for name in names]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self._read_meta(step)[0]

    def remove_unfinished(self) -> None:
        """Removes what a killed run was writing."""
        if processes.is_first():
            for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
        processes.wait_for_all("removed unfinished checkpoints")

    def set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints away, since orbax silently refuses to save below the newest."""
        steps = list(steps)
        if not steps:
            return
        self._manager.close()
        processes.wait_for_all("closed the checkpoints")
        for step in steps if processes.is_first() else ():
            target = self._folder.parent / "set_aside" / f"{self._folder.name}-{step}"
            while target.exists():
                target = target.with_name(target.name + "-again")
            target.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
            processes.say(f"{self._folder}/{step}: moved to {target}")
        processes.wait_for_all("moved checkpoints")
        self._manager = self._open()


class _Manager(ocp.CheckpointManager):
    """Leaves it to the training loop to ask about signals: jax counts who asks how often."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _named(tree: Any) -> dict[str, jax.Array]:
    """Leaves by their path, so that a checkpoint does not depend on the types of containers."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def _copy(leaf: jax.Array) -> np.ndarray | jax.Array:
    """Of an array that is whole here, one of the host's; of a part, one of the devices'."""
    if leaf.sharding.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    return jnp.copy(leaf)


def _checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """One for each array, the same on any number of devices and processes."""
    return processes.sum_over_all({name: _checksum(leaf) for name, leaf in leaves.items()})


def _checksum(leaf: jax.Array) -> int:
    """The share of this process in the sum of all elements, each times an odd number of its own.

    No single flipped bit leaves the sum modulo 2**64 as it was.
    """
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    return sum(_weighted_sum(shard, leaf.shape) for shard in shards) % 2**64


def _weighted_sum(shard: Any, shape: tuple[int, ...]) -> int:
    data = np.ascontiguousarray(shard.data)
    words = data.view(np.dtype(f"u{min(data.dtype.itemsize, 8)}")).reshape(*data.shape, -1)
    position, stride = np.arange(words.shape[-1], dtype=np.uint64), words.shape[-1]
    for part, size in reversed(list(zip(shard.index, shape, strict=True))):
        rows = np.arange(*part.indices(size)[:2], dtype=np.uint64) * np.uint64(stride)
        position = np.add.outer(rows, position.ravel())
        stride *= size
    odd = (2 * position.ravel() + 1) * np.uint64(0x9E3779B97F4A7C15)
    return int((words.ravel() * odd).sum(dtype=np.uint64))


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _why_not_written(error: Exception) -> str:
    """One sentence where the system said why; tensorstore wraps that in paths of its own."""
    found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))
    code = int(found[1]) if found else getattr(error, "errno", None)
    if code is None:
        return _first_line(error)
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    then = "; make room, and the same command goes on from the one before" if full else ""
    return os.strerror(code) + then


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
