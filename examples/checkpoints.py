"""Checkpoints with orbax: the whole state of a run in one atomic, asynchronous step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
            return ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be used: {error.strerror}") from None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to write; returns once the next update may change the state."""
        # A copy: donated buffers may be overwritten while they are still being written to disk.
        arrays = {name: jnp.copy(leaf) for name, leaf in _named(state).items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
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

    def restore(self, template: Any) -> Restored | None:
        """The newest checkpoint that can be read; those that cannot are set aside.

        Args:
          template: a state of the wanted shapes, dtypes and shardings.

        Returns:
          None where there is no checkpoint.

        Raises:
          UserError: if there are some, but none can be read.
        """
        steps, reasons = self.steps(), []
        for step in steps:
            try:
                restored = self._read(step, template)
            except Exception as error:  # whatever a damaged file makes orbax raise
                reasons.append(f"{self._folder}/{step}: damaged ({_first_line(error)})")
                print(f"{reasons[-1]}; trying the one before", flush=True)
                continue
            self._set_aside([s for s in steps if s > step])
            return restored
        if reasons:
            raise UserError(f"no checkpoint can be read; {reasons[0]}")
        return None

    def _read(self, step: int, template: Any) -> Restored:
        meta_only = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=meta_only)["meta"]
        names = _named(template)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in names.items()
        }
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=items)["state"]
        # Copied: what orbax returns cannot always be donated.
        leaves = [jnp.copy(arrays[name]) for name in names]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), leaves), meta)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints away, since orbax silently refuses to save below the newest."""
        if not steps:
            return
        self._manager.close()
        for step in steps:
            target = self._folder.parent / "damaged" / f"{self._folder.name}-{step}"
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
