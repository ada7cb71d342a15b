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
    """A checkpoint: a state of the template's structure, and the metadata saved with it."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The newest ``keep`` checkpoints in ``folder``, each in a subfolder named by its step."""

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder.absolute(), keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Two managers need different barriers; otherwise their threads would wait for each other.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self._folder.name)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, multiprocessing_options=barriers
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # orbax ignores a file in its place
            return _Manager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be used: {error.strerror}") from None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write; returns once the next update may change the state."""
        leaves = _named(state)
        sealed = {"meta": meta, "checksums": _checksums(leaves)}
        sealed["checksum"] = _json_checksum(sealed)
        # A copy, because the next update may overwrite donated buffers during the writing.
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

    def restore_newest(
        self, template: Any, accept: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored | None:
        """Reads the newest readable checkpoint; newer ones that are damaged are set aside.

        Args:
          template: a state with the wanted shapes, dtypes and shardings.
          accept: is called with the metadata before the state is read; raises UserError to refuse
            the checkpoint.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          UserError: if there are checkpoints, but none can be read.
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
                processes.say(f"{reasons[-1]}; trying the previous one")
                continue
            self.set_aside(s for s in steps if s > step)
            return restored
        if reasons:
            raise UserError(
                f"no checkpoint can be read; {reasons[0]}; restore one from a backup, or choose "
                "another --workdir"
            )
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
        for name, checksum in _checksums(arrays).items():  # orbax and zstd do not check values
            if checksums[name] != checksum:
                raise ValueError(f"the checksum of {name} is wrong")
        # A copy, because the arrays that orbax returns cannot always be donated.
        leaves = [jnp.copy(arrays[name]) for name in names]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint."""
        return self._read_meta(step)[0]

    def remove_unfinished(self) -> None:
        """Removes checkpoints that a killed run did not finish."""
        if processes.is_first():
            for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
        processes.wait_for_all("removed unfinished checkpoints")

    def set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints away, because orbax silently refuses to save below the newest step."""
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
    """Does not ask for signals: jax counts the questions, and the training loop asks already."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _named(tree: Any) -> dict[str, jax.Array]:
    """Leaves by their paths, so that a checkpoint does not depend on the types of containers."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def _copy(leaf: jax.Array) -> np.ndarray | jax.Array:
    """A copy on the host if the whole array is here, otherwise a copy on the devices."""
    if leaf.sharding.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    return jnp.copy(leaf)


def _checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """A checksum for each array; it does not depend on the number of devices and processes."""
    return processes.sum_over_all({name: _checksum(leaf) for name, leaf in leaves.items()})


def _checksum(leaf: jax.Array) -> int:
    """This process's part of a weighted sum of all elements, modulo 2**64.

    Each element has a different odd weight, so every single flipped bit changes the sum.
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
    """The reason in one sentence, without the long text that tensorstore adds to it."""
    found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))
    code = int(found[1]) if found else getattr(error, "errno", None)
    if code is None:
        return _first_line(error)
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    then = "; free some space and run the same command again to resume" if full else ""
    return os.strerror(code) + then


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
