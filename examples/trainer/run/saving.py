"""What a run saves and where it resumes: the newest checkpoints, and the best one."""

import json
from pathlib import Path
from typing import Any

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError
from examples.trainer.options import effects
from examples.trainer.options.fields import flatten
from examples.trainer.run.checkpoints import Checkpoints, Restored
from examples.trainer.run.reporting import Reporter
from examples.trainer.run.state import TrainState
from examples.trainer.run.workdir import refuse_other, refuse_other_data
from examples.trainer.tasks.task import Task


class Saver:
    """The newest checkpoints in ``workdir/checkpoints``, and the best in ``workdir/best``."""

    def __init__(self, workdir: Path, config: Any, task: Task, fingerprint: int):
        self._config, self._task, self._workdir = config, task, workdir
        self._fingerprint = fingerprint  # of the data
        self._checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
        self._best: Checkpoints | None = None
        self._saved: int | None = None

    def find_checkpoint(self, state: TrainState) -> Restored | None:
        """The newest checkpoint of this run, if any, like ``state`` in shapes and shardings."""
        restored = self._checkpoints.restore_newest(state, self._accept)
        self._saved = restored.step if restored else None
        return restored

    def _accept(self, meta: dict[str, Any]) -> None:
        refuse_other(self._workdir, meta["config"], self._config)
        refuse_other_data(self._workdir, meta.get("fingerprint"), self._fingerprint, self._config)

    def begin(self) -> None:
        """Prepares the folders, and reports where the run resumes."""
        if self._saved is not None:
            processes.say(f"{self._workdir}: resuming from step {self._saved}")
        self._checkpoints.remove_unfinished()
        if self._config.keep_best:
            self._best = Checkpoints(self._workdir / "best", 1)
            if self._saved is None:
                self._best.set_aside(self._best.steps())  # left by a run without checkpoints

    def save(self, step: int, state: TrainState, reporter: Reporter, position: Any) -> None:
        """Starts to write a checkpoint; ``position`` is that of the data, as JSON values."""
        if step == self._saved:  # the run was stopped before its first new update
            return
        reporter.flush()
        self.refuse_nonfinite(state, step)
        meta = {"config": self._config.to_dict(), "history": reporter.history, "data": position}
        meta["fingerprint"] = self._fingerprint
        if self._best is not None:
            self._best.wait()  # no checkpoint may exist without the best one before it
        self._checkpoints.save(step, state, json.loads(json.dumps(meta)))
        self._saved = step

    def save_best(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """Saves to ``best`` if the row of this step is the best so far."""
        # The run may have saved this or a later step before it was killed or damaged.
        if self._best is None or any(kept >= step for kept in self._best.steps()):
            return
        reporter.flush()
        if is_best(self._task, reporter.history, step):
            self.refuse_nonfinite(state, step)
            self._best.save(step, state, {"row": reporter.history[-1]})

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._checkpoints.wait()
        if self._best is not None:
            self._best.wait()

    def wait_unless_in_a_hurry(self, kind: type[BaseException] | None, *_: object) -> None:
        """For an ``ExitStack``: waits, except after a second Ctrl-C."""
        if kind is not KeyboardInterrupt and not (kind and processes.several()):
            self.wait()

    def refuse_nonfinite(self, state: TrainState, step: int) -> None:
        skipped = int(state.skipped)
        if skipped and self._config.nonfinite == "stop":
            raise UserError(
                f"the loss or its gradient was not finite in {skipped} steps before step {step}; "
                "the last checkpoint is from before that; in another --workdir, try "
                f"{remedies(self._config)}"
            )


def remedies(config: Any) -> str:
    """Settings that may keep the loss finite and that this config does not ignore."""
    found = []
    if not effects.ignored(["learning_rate"], flatten(config.to_dict())):
        found.append(f"a learning rate below {config.learning_rate:g}")
    below = config.clip_norm / 10 or 1.0
    return ", ".join([*found, f"--config.clip_norm={below:g}", "or --config.nonfinite=skip"])


def is_best(task: Task, history: list[dict[str, float]], step: int) -> bool:
    """Whether the last row is that of this step, with the best test result so far."""
    name = f"test_{task.score}"
    results = [row[name] for row in history if name in row]
    if not results or history[-1]["step"] != step or name not in history[-1]:
        return False
    sign = 1 if task.higher_is_better else -1
    return len(results) == 1 or sign * results[-1] > max(sign * r for r in results[:-1])
