"""Reports a run: rows of metrics to files and the terminal, and curves at the end."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError
from examples.trainer.run import plots
from examples.trainer.run.board import Board
from examples.trainer.tasks.task import Task

Row = dict[str, float]


class Reporter:
    """Collects the rows of a run with a delay of one, so that the device never waits for the host.

    A row stays on the device until the next one arrives or ``flush`` is called. Then it is written
    to ``metrics.jsonl``, to TensorBoard and to standard output. The speed is shown but not stored,
    so that rows depend only on the config. If several processes train, only the first one writes.
    """

    def __init__(self, workdir: Path, task: Task, history: list[Row], total: int, board: bool):
        self.history, self._task, self._workdir = list(history), task, workdir
        self._pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._writes, self._board = processes.is_first(), None
        self._log = workdir / "metrics.jsonl"
        if self._writes:
            temporary = self._log.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in history))
            temporary.replace(self._log)
        if self._writes and board:
            self._board = Board(workdir, int(history[-1]["step"]) if history else 0)
        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()]
        self._progress = Progress(
            *columns, TextColumn("{task.fields[speed]}"), transient=True,
            disable=not (self._writes and sys.stdout.isatty()),
        )  # fmt: skip
        self._bar = self._progress.add_task("training", total=total, speed="compiling")
        self._mark: tuple[float, int] | None = None
        self._speed = 0.0
        self._progress.start()

    def show_progress(self, step: int, batch_size: int) -> None:
        """Moves the progress bar; the first call, after compilation, starts the clock."""
        now = time.perf_counter()
        if self._mark is None:
            self._mark = now, step
        elapsed, steps = now - self._mark[0], step - self._mark[1]
        self._speed = steps * batch_size / elapsed if steps else 0.0
        self._progress.update(self._bar, completed=step, speed=f"{self._speed:,.0f} samples/s")

    def add(self, row: dict[str, Any], sums: dict[str, Any]) -> None:
        """Takes a row; ``sums`` maps prefixes such as "train_" to sums on the device.

        The values of the row may also be on the device.
        """
        self.flush()
        self._pending = row, sums

    def flush(self) -> None:
        """Fetches and writes the waiting row."""
        if self._pending is None:
            return
        (row, sums), self._pending = self._pending, None
        row, fetched = jax.device_get((row, sums))
        row = {name: np.asarray(value).item() for name, value in row.items()}
        for prefix in (p for p in sums if fetched[p]["samples"] > 0):  # 0: all skipped
            metrics = self._task.summarize({k: float(v) for k, v in fetched[prefix].items()})
            suffix = "_at_params" if prefix == "params_" else ""
            start = "test_" if suffix else prefix
            row |= {f"{start}{name}{suffix}": value for name, value in metrics.items()}
        self.history.append(row)
        if self._writes:
            self._write(row)

    def _write(self, row: Row) -> None:
        try:
            with self._log.open("a") as log:
                log.write(json.dumps(row) + "\n")
            if self._board is not None:
                scalars = {k: v for k, v in row.items() if k not in ("step", "epoch")}
                if self._speed:
                    scalars["samples_per_second"] = self._speed
                self._board.write(scalars, int(row["step"]))
        except OSError as error:
            self._board = None
            name = "metrics.jsonl or the events of TensorBoard"
            message = f"{self._workdir}: {name} cannot be written: {error.strerror}"
            raise UserError(message) from None
        self._progress.console.print(format_row(row, self._speed), highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def save_curves(self) -> None:
        """Draws the curves of all metrics."""
        self.flush()
        if self._writes:
            plots.save_curves(self._workdir / "curves.png", self.history)


def format_row(row: Row, speed: float = 0.0) -> str:
    """The row in one line, for people and for grep."""
    shown = {k: v for k, v in row.items() if not k.endswith("_at_params") and k != "epoch"}
    parts = [f"epoch: {row['epoch']:.2f}".removesuffix(".00")]
    for name, value in shown.items():
        digits = f"{value:.2f}" if "accuracy" in name else f"{value:.4g}"
        parts.append(f"{name}: {digits}")
    return ", ".join(parts) + (f", {speed:,.0f} samples/s" if speed else "")
