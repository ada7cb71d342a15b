"""What a run saves and where it goes on: checkpoints, and the best of them."""

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
from examples.trainer.tasks.tasks import Task


class Saver:
    """The checkpoints of a run in ``workdir/checkpoints``, and in ``workdir/best`` the best."""

    def __init__(self, workdir: Path, config: Any, task: Task, fingerprint: int):
        self._config, self._task, self._workdir = config, task, workdir
        self._fingerprint = fingerprint  # of the data
        self._checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
        self._best: Checkpoints | None = None
        self._saved: int | None = None

    def restore(self, state: TrainState) -> Restored | None:
        """The newest checkpoint, with the shapes and shardings of ``state``, if there is one."""
        restored = self._checkpoints.restore(state, self._accept)
        self._saved = restored.step if restored else None
        return restored

    def _accept(self, meta: dict[str, Any]) -> None:
        refuse_other(self._workdir, meta["config"], self._config)
        refuse_other_data(self._workdir, meta.get("fingerprint"), self._fingerprint, self._config)

    def begin(self) -> None:
        """Prepares the folders for what this run will save."""
        self._checkpoints.remove_unfinished()
        if self._config.keep_best:
            self._best = Checkpoints(self._workdir / "best", 1)
            if self._saved is None:
                self._best.set_aside(self._best.steps())  # of a run whose checkpoints are gone

    def save(self, step: int, state: TrainState, reporter: Reporter, position: Any) -> None:
        """Begins to write a checkpoint; ``position`` is that of the data, as JSON values."""
        if step == self._saved:  # stopped before the next update
            return
        reporter.flush()
        self.refuse_nonfinite(state, step)
        meta = {"config": self._config.to_dict(), "history": reporter.history, "data": position}
        meta["fingerprint"] = self._fingerprint
        if self._best is not None:
            self._best.wait()  # a checkpoint goes on after the best one before it, never without
        self._checkpoints.save(step, state, json.loads(json.dumps(meta)))
        self._saved = step

    def save_best(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """The same in ``best``, if the row of this step is the best so far."""
        # There already, or a later one: this run was there before it was killed or damaged.
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
        """For an ``ExitStack``: after a second Ctrl-C nothing is waited for."""
        if kind is not KeyboardInterrupt and not (kind and processes.several()):
            self.wait()

    def refuse_nonfinite(self, state: TrainState, step: int) -> None:
        skipped = int(state.skipped)
        if skipped and self._config.nonfinite == "stop":
            raise UserError(
                f"the loss or its gradient was not finite in {skipped} steps before step {step}; "
                "the last checkpoint is from before; try, in another --workdir, "
                f"{remedies(self._config)}"
            )


def remedies(config: Any) -> str:
    """What may keep the loss of this config finite: nothing that it would ignore."""
    found = []
    if not effects.ignored(["learning_rate"], flatten(config.to_dict())):
        found.append(f"a learning rate below {config.learning_rate:g}")
    below = config.clip_norm / 10 or 1.0
    return ", ".join([*found, f"--config.clip_norm={below:g}", "or --config.nonfinite=skip"])


def is_best(task: Task, history: list[dict[str, float]], step: int) -> bool:
    """Whether the last row is of this step, and its test result better than all before."""
    name = f"test_{task.score}"
    results = [row[name] for row in history if name in row]
    if not results or history[-1]["step"] != step or name not in history[-1]:
        return False
    sign = 1 if task.higher_is_better else -1
    return len(results) == 1 or sign * results[-1] > max(sign * r for r in results[:-1])
