"""Checkpoints with orbax: the whole state of a run in one atomic, asynchronous step."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from examples.errors import UserError


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
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # orbax overlooks a file in its place
            return ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be used: {error.strerror}") from None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to write; returns once the next update may change the state."""
        # A copy: donated buffers may be overwritten while they are still being written to disk.
        arrays = {name: np.array(leaf) for name, leaf in _named(state).items()}
        sealed = {"meta": meta, "checksums": {name: _checksum(a) for name, a in arrays.items()}}
        sealed["checksum"] = _checksum(sealed)
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
            reason = _first_line(error)
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
                print(f"{reasons[-1]}; trying the one before", flush=True)
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
        if checksum != _checksum(sealed):
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
        for name, array in arrays.items():  # orbax and zstd check none of the values
            if checksums[name] != _checksum(np.asarray(array)):
                raise ValueError(f"the checksum of {name} is wrong")
        # Copied: what orbax returns cannot always be donated.
        leaves = [jnp.copy(arrays[name]) for name in names]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self._read_meta(step)[0]

    def remove_unfinished(self) -> None:
        """Removes what a killed run was writing."""
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints away, since orbax silently refuses to save below the newest."""
        steps = list(steps)
        if not steps:
            return
        self._manager.close()
        for step in steps:
            target = self._folder.parent / "set_aside" / f"{self._folder.name}-{step}"
            while target.exists():
                target = target.with_name(target.name + "-again")
            target.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
            print(f"{self._folder}/{step}: moved to {target}", flush=True)
        self._manager = self._open()


def _named(tree: Any) -> dict[str, jax.Array]:
    """Leaves by their path, so that a checkpoint does not depend on the types of containers."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def _checksum(value: Any) -> int:
    """Of an array, or of JSON values."""
    if isinstance(value, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
