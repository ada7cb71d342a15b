"""The training loop.

Running the same command again resumes from the newest checkpoint; the results are bit for bit those
of an uninterrupted run.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.trainer.cluster import processes
from examples.trainer.cluster.signals import StopRequest
from examples.trainer.errors import expand
from examples.trainer.loop import steps, stopping
from examples.trainer.loop.evaluation import Evaluation
from examples.trainer.loop.feeds import Feed
from examples.trainer.loop.setup import Setup, set_up
from examples.trainer.options.values import check_config
from examples.trainer.run.reporting import Reporter, Row, format_row
from examples.trainer.run.saving import Saver
from examples.trainer.run.state import TrainState
from examples.trainer.run.workdir import claim, write_config


class Interrupted(Exception):
    """Raised after a signal, once everything is saved."""


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> list[Row]:
    """Trains as ``config`` describes and returns the rows of ``metrics.jsonl``.

    ``workdir`` gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, at the end,
    plots. A finished run is not repeated; an interrupted one resumes. If several processes train
    together, each of them calls this with the same config and a ``workdir`` that all can reach.
    """
    check_config(config)
    workdir = expand(workdir)
    setup = set_up(config)
    task, feed, total = setup.task, setup.feed, setup.total
    claim(workdir, config)
    saver = Saver(workdir, config, task, setup.fingerprint)
    state, history = resume(setup, saver)
    step = int(state.step)
    ended = stopping.reason_to_end(config, task, history)
    if is_complete(workdir) and (ended or step == total):
        processes.say(f"{workdir}: already finished; {format_row(history[-1])}")
        return history

    saver.begin()
    write_config(workdir, config)
    compile_update(config, setup)
    evaluation = Evaluation(config, workdir, setup)
    reporter = Reporter(workdir, task, history, total, config.tensorboard)
    stop = StopRequest()
    with clean_up(stop, saver, reporter, feed):
        saver.save_best(step, state, reporter)  # if the run was killed just before it did so
        while step < total and not ended:
            end = next_stop(config, step, feed.steps_per_epoch, total)
            state, step, halting = update_until(end, feed, state, step, stop)
            reporter.show_progress(step, config.batch_size)
            now = due(config, step, feed.steps_per_epoch, total) if step == end else Due()
            if now.row:
                results = evaluation.evaluate(state, step) if now.evaluation else {}
                row = new_row(config, setup, step, state, reporter.history)
                reporter.add(row, {"train_": state.sums} | results)
                state = clear_sums(setup, state)
            if now.evaluation:
                saver.save_best(step, state, reporter)
                state, ended = stopping.react(config, task, state, reporter)
            if halting or now.checkpoint or ended:
                saver.save(step, state, reporter, feed.get_state())
            if halting and step < total and not ended:
                saver.wait()
                raise Interrupted(f"stopped at step {step} of {total}")
        if ended:
            processes.say(f"ended at step {step} of {total}: {ended}")
        finish(state, saver, evaluation, reporter)
    return reporter.history


def resume(setup: Setup, saver: Saver) -> tuple[TrainState, list[Row]]:
    """The state and the rows of the newest checkpoint; those of a new run if there is none."""
    restored = saver.find_checkpoint(setup.state)
    if restored is None:
        return setup.state, []
    setup.feed.set_state(restored.meta["data"])
    return restored.state, restored.meta["history"]


def is_complete(workdir: Path) -> bool:
    """Whether a run has written everything, down to the plot that it draws last."""
    return (workdir / "curves.png").exists()


def compile_update(config: Any, setup: Setup) -> None:
    update = steps.make_update(
        setup.task, setup.optimizer.transformation, config.accumulate, setup.layout
    )
    setup.feed.compile(update)


def clean_up(
    stop: StopRequest, saver: Saver, reporter: Reporter, feed: Feed
) -> contextlib.ExitStack:
    """On exit, also after an error: ends background work and restores the signal handlers."""
    stack = contextlib.ExitStack()  # the last of these runs first
    stack.callback(stop.uninstall)
    stack.push(saver.wait_unless_in_a_hurry)
    stack.callback(reporter.close)
    stack.callback(feed.close)
    return stack


def update_until(
    end: int, feed: Feed, state: TrainState, step: int, stop: StopRequest
) -> tuple[TrainState, int, bool]:
    """Updates until step ``end`` or a request to stop; returns state, step and whether to stop."""
    halting = stop.requested()
    while step < end and not halting:
        n = feed.stride or end - step
        state, step = feed.advance(state, step, n), step + n
        halting = stop.requested()
    return state, step, halting


def finish(state: TrainState, saver: Saver, evaluation: Evaluation, reporter: Reporter) -> None:
    """Completes the folder: plots come last, once everything else is on disk."""
    saver.wait()
    evaluation.save_results(state)
    reporter.save_curves()
    processes.wait_for_all("finished")


def next_stop(config: Any, step: int, steps_per_epoch: int, total: int) -> int:
    """The next step at which something is logged, evaluated or saved.

    These steps do not depend on where a run was interrupted. A resumed run therefore executes the
    same compiled programs, and gets the same numbers.
    """
    after = lambda period: (step // period + 1) * period
    periods = [steps_per_epoch, config.log_every, config.checkpoint_every]
    return min(total, *(after(period) for period in periods if period))


class Due(NamedTuple):
    """What is to be done after a step."""

    row: bool = False  # of the log
    evaluation: bool = False
    checkpoint: bool = False


def due(config: Any, step: int, steps_per_epoch: int, total: int) -> Due:
    epoch, within = divmod(step, steps_per_epoch)
    evaluation = step == total or (within == 0 and epoch % config.eval_every == 0)
    row = evaluation or (config.log_every > 0 and step % config.log_every == 0)
    every = config.checkpoint_every or steps_per_epoch
    return Due(row, evaluation, step == total or step % every == 0)


def new_row(
    config: Any, setup: Setup, step: int, state: TrainState, history: list[Row]
) -> dict[str, Any]:
    """The position and the hyperparameters of the update that led here, without metrics."""
    scale = stopping.learning_rate_scale(config, setup.task, history)
    row = {"step": step, "epoch": step / setup.feed.steps_per_epoch}
    row |= setup.optimizer.hyperparameters(state.opt_state, step - 1, scale)
    return row | setup.feed.counters()


def clear_sums(setup: Setup, state: TrainState) -> TrainState:
    """Starts new sums of metrics; the log still holds the old ones."""
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in state.sums.items()}
    return state._replace(sums=setup.layout.put_whole(zeros))
