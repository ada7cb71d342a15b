"""Trains a Flax model: ``python -m examples.trainer --config=CONFIG --workdir=FOLDER``.

The same command again goes on from the newest checkpoint, to the same numbers bit for bit.
"""

import contextlib
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.trainer import optimizer
from examples.trainer.cluster import processes
from examples.trainer.cluster.layout import Layout
from examples.trainer.cluster.signals import StopRequest
from examples.trainer.data import datasets
from examples.trainer.errors import UserError, expand
from examples.trainer.loop import feeds, lr_finder, steps, stopping
from examples.trainer.options.values import check
from examples.trainer.run import plots
from examples.trainer.run.reporting import Reporter, Row, describe
from examples.trainer.run.saving import Saver
from examples.trainer.run.workdir import claim, write_config
from examples.trainer.tasks import tasks


class Interrupted(Exception):
    """Raised after a signal, when everything is saved."""


class Setup(NamedTuple):
    """What a config describes, before the first update."""

    task: tasks.Task
    feed: feeds.MemoryFeed | feeds.StreamFeed
    test: steps.Batch  # whole on every device
    optimizer: optimizer.Optimizer
    state: steps.TrainState
    total: int  # updates in all
    layout: Layout
    fingerprint: int  # of the data; of a stream, of what is read before it starts


def set_up(config: Any) -> Setup:
    """Reads the data and makes model, optimizer and state on all devices."""
    layout = Layout(config.devices)
    if config.dataset == "shards":
        dataset, source = feeds.open_stream(config)
        feed = feeds.StreamFeed(config, source, dataset.train, layout)
    else:
        dataset = datasets.load(config)
        feed = feeds.MemoryFeed(config, dataset, layout)
    total = config.num_epochs * feed.steps_per_epoch
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    task = tasks.make(config, dataset, init_key)
    maker = optimizer.make(config, feed.steps_per_epoch, total)
    state = steps.initial_state(task, maker.transformation, run_key, feed.samples)
    test = layout.put_whole(dataset.test)
    fingerprint = datasets.fingerprint(dataset)
    if not processes.all_have(fingerprint):
        raise UserError(
            f"the processes found different data for config.dataset={config.dataset}; give all of "
            "them the same files"
        )
    return Setup(task, feed, test, maker, layout.put_whole(state), total, layout, fingerprint)


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> list[Row]:
    """Trains as ``config`` says and returns the rows of ``metrics.jsonl``.

    ``workdir`` gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, at the end,
    plots. A run that is finished there is not repeated; an interrupted one goes on. Several
    processes call it alike, with one ``workdir`` that all of them reach.
    """
    check(config)
    workdir = expand(workdir)
    task, feed, test, maker, state, total, layout, fingerprint = set_up(config)
    steps_per_epoch = feed.steps_per_epoch

    claim(workdir, config)
    saver = Saver(workdir, config, task, fingerprint)
    history: list[Row] = []
    over = ""  # why it ended early
    if restored := saver.restore(state):
        state, history = restored.state, restored.meta["history"]
        feed.set_state(restored.meta["data"])
        over = stopping.reason_to_end(config, task, history)
        drawn = (workdir / "curves.png").exists()  # the last thing
        if drawn and (over or restored.step == total):
            processes.say(f"{workdir}: finished before; {describe(history[-1])}")
            return history
        processes.say(f"{workdir}: going on from step {restored.step}")
    saver.begin()
    write_config(workdir, config)

    feed.compile(steps.make_update(task, maker.transformation, config.accumulate, layout.constrain))
    evaluate = steps.make_evaluate(task, config.eval_batch_size)
    refresh = steps.make_refresh(task, config.batch_size)
    reporter = Reporter(workdir, task, history, total, config.tensorboard)
    stop, step = StopRequest(), int(state.step)
    scale = stopping.learning_rate_scale(config, task, history)

    with contextlib.ExitStack() as finally_do:  # all of it, the last first, whatever fails
        finally_do.callback(stop.restore)
        finally_do.push(saver.wait_unless_in_a_hurry)
        finally_do.callback(reporter.close)
        finally_do.callback(feed.close)
        saver.save_best(step, state, reporter)  # killed between a checkpoint and its copy
        while step < total and not over:
            end, halting = next_stop(config, step, steps_per_epoch, total), stop.requested()
            while step < end and not halting:
                n = feed.stride or end - step
                state = feed.advance(state, step, n)
                step += n
                halting = stop.requested()
            reporter.advance(step, config.batch_size)
            now = due(config, step, steps_per_epoch, total) if step == end else Due()
            if now.row:
                row = {"step": step, "epoch": step / steps_per_epoch}
                row |= maker.hyperparameters(state.opt_state, step - 1, scale) | feed.counters()
                sums, zeros = (
                    {"train_": state.sums},
                    {k: np.zeros(v.shape, v.dtype) for k, v in state.sums.items()},
                )
                state = state._replace(sums=layout.put_whole(zeros))
                if now.evaluation:
                    params = evaluation_params(state)
                    rest = refresh(params, feed.samples)
                    sums["test_"] = evaluate(params, rest, test)
                    sums["params_"] = evaluate(state.params, state.rest, test)
                    epoch = round(step / steps_per_epoch)
                    plots.save_progress(workdir, task, params, rest, epoch)
                reporter.add(row, sums)
            if now.evaluation:
                saver.save_best(step, state, reporter)
                if stopping.is_wanted(config):
                    reporter.flush()  # waits for the device
                    scale = stopping.learning_rate_scale(config, task, reporter.history)
                    state = stopping.with_scale(config, state, scale)
                    over = stopping.reason_to_end(config, task, reporter.history)
            if halting or now.checkpoint or over:
                saver.save(step, state, reporter, feed.get_state())
            if halting and step < total and not over:
                saver.wait()
                raise Interrupted(f"stopped at step {step} of {total}")
        if over:
            processes.say(f"ended at step {step} of {total}: {over}")
        saver.wait()
        params = evaluation_params(state)
        plots.save_results(workdir, task, params, refresh(params, feed.samples), test)
        reporter.finish()
        processes.wait_for_all("finished")
    return reporter.history


class Due(NamedTuple):
    """What is to be done after a step."""

    row: bool = False  # of the log
    evaluation: bool = False
    checkpoint: bool = False


def due(config: Any, step: int, steps_per_epoch: int, total: int) -> Due:
    epoch, rest = divmod(step, steps_per_epoch)
    evaluation = step == total or (rest == 0 and epoch % config.eval_every == 0)
    row = evaluation or (config.log_every > 0 and step % config.log_every == 0)
    every = config.checkpoint_every or steps_per_epoch
    return Due(row, evaluation, step == total or step % every == 0)


def find_learning_rate(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
    """In place of training; see :mod:`examples.trainer.loop.lr_finder`."""
    check(config)
    workdir = expand(workdir)
    setup = set_up(config)
    claim(workdir, config)
    return lr_finder.find(config, workdir, setup)


def evaluation_params(state: steps.TrainState) -> Any:
    """The iterate of NAG; other optimizers keep it as their params."""
    return steps.evaluation_params(state.params, state.opt_state)


def next_stop(config: Any, step: int, steps_per_epoch: int, total: int) -> int:
    """The next step where something is logged, evaluated or saved.

    Always on the same grid, however often a run was interrupted: so the compiled programs are the
    same, and the numbers with them.
    """
    after = lambda period: (step // period + 1) * period
    periods = [steps_per_epoch, config.log_every, config.checkpoint_every]
    return min(total, *(after(period) for period in periods if period))
