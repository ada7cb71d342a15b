"""Trains a Flax model: ``python -m examples.train --config=CONFIG --workdir=FOLDER``.

The same command again goes on from the newest checkpoint, to the same numbers bit for bit.
"""

import ast
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import config_flags

import nag_jax
from examples import data, feeds, optimizer, plots, steps, tasks
from examples.checkpoints import Checkpoints
from examples.config_check import check
from examples.errors import UserError
from examples.reporting import Reporter, Row, describe
from examples.signals import StopRequest
from examples.workdir import claim, refuse_other, write_config


class Interrupted(Exception):
    """Raised after a signal, when everything is saved."""


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> list[Row]:
    """Trains as ``config`` says and returns the rows of ``metrics.jsonl``.

    ``workdir`` gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, at the end,
    plots. A run that is finished there is not repeated; an interrupted one goes on.
    """
    check(config)
    replicated, constrain = over_devices(config)
    if config.dataset == "shards":
        dataset, source = feeds.open_stream(config)
        feed = feeds.StreamFeed(config, source, dataset.train)
    else:
        dataset = data.load(config)
        feed = feeds.MemoryFeed(config, dataset, replicated)
    steps_per_epoch = feed.steps_per_epoch
    total = config.num_epochs * steps_per_epoch
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    task = tasks.make(config, dataset, init_key)
    maker = optimizer.make(config, steps_per_epoch, total)
    test = jax.device_put(dataset.test, replicated)
    state = steps.initial_state(task, maker.transformation, run_key, feed.samples)
    state = jax.device_put(state, replicated)

    workdir = Path(workdir)
    claim(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    history: list[Row] = []
    accept = lambda meta: refuse_other(workdir, meta["config"], config)
    if restored := checkpoints.restore(state, accept):
        state, history = restored.state, restored.meta["history"]
        feed.set_state(restored.meta["data"])
        if restored.step == total and (workdir / "curves.png").exists():  # the last thing drawn
            print(f"{workdir}: finished before; {describe(history[-1])}")
            return history
        print(f"{workdir}: going on from step {restored.step}", flush=True)
    checkpoints.remove_unfinished()
    write_config(workdir, config)

    update = steps.make_update(task, maker.transformation, config.accumulate, constrain)
    feed.compile(update)
    evaluate = steps.make_evaluate(task, config.eval_batch_size)
    refresh = steps.make_refresh(task, config.batch_size)
    best = Checkpoints(workdir / "best", 1) if config.keep_best else None
    if best is not None and restored is None:
        best.set_aside(best.steps())  # of a run whose checkpoints are gone
    reporter = Reporter(workdir, task, history, total, config.tensorboard)
    stop = StopRequest()
    step = int(state.step)
    saved = restored.step if restored else None

    def save() -> None:
        nonlocal saved
        if step == saved:  # stopped before the next update
            return
        reporter.flush()
        refuse_nonfinite(config, state, step)
        meta = {"config": config.to_dict(), "history": reporter.history}
        meta["data"] = feed.get_state()
        if best is not None:
            best.wait()  # a checkpoint goes on after the best one before it, never without
        checkpoints.save(step, state, json.loads(json.dumps(meta)))
        saved = step

    def save_best() -> None:
        # There already, or a later one: this run was there before it was killed or damaged.
        if best is None or any(kept >= step for kept in best.steps()):
            return
        reporter.flush()
        if is_best(task, reporter.history, step):
            refuse_nonfinite(config, state, step)
            best.save(step, state, {"row": reporter.history[-1]})

    with contextlib.ExitStack() as finally_do:  # all of it, the last first, whatever fails
        written_to = [checkpoints] if best is None else [checkpoints, best]

        def wait(kind: Any, *_: Any) -> None:
            if kind is not KeyboardInterrupt:  # that one is in a hurry
                for written in written_to:
                    written.wait()

        finally_do.callback(stop.restore)
        finally_do.push(wait)
        finally_do.callback(reporter.close)
        finally_do.callback(feed.close)
        save_best()  # killed between a checkpoint and its copy
        while step < total:
            end = next_stop(config, step, steps_per_epoch, total)
            while step < end and not stop.requested:
                n = feed.stride or end - step
                state = feed.advance(state, step, n)
                step += n
            reporter.advance(step, config.batch_size)
            if step < end:
                save()
                raise Interrupted(f"stopped at step {step} of {total}")
            epoch_ends = step % steps_per_epoch == 0
            evaluating = epoch_ends and step // steps_per_epoch % config.eval_every == 0
            if evaluating or step == total or (config.log_every and step % config.log_every == 0):
                row = {"step": step, "epoch": step / steps_per_epoch}
                row |= maker.hyperparameters(step - 1) | feed.counters()
                sums = {"train_": state.sums}
                state = state._replace(sums=jax.tree.map(jnp.zeros_like, state.sums))
                if evaluating or step == total:
                    params = evaluation_params(state)
                    sums["test_"] = evaluate(params, refresh(params, feed.samples), test)
                    sums["params_"] = evaluate(state.params, state.rest, test)
                    plots.save_progress(
                        workdir, task, params, state.rest, round(step / steps_per_epoch)
                    )
                reporter.add(row, sums)
                if evaluating or step == total:
                    save_best()
            if step == total or stop.requested or (
                step % config.checkpoint_every == 0 if config.checkpoint_every else epoch_ends
            ):  # fmt: skip
                save()
            if stop.requested and step < total:
                raise Interrupted(f"stopped at step {step} of {total}")
        for written in written_to:
            written.wait()
        params = evaluation_params(state)
        plots.save_results(workdir, task, params, refresh(params, feed.samples), test)
        reporter.finish()
    return reporter.history


def evaluation_params(state: steps.TrainState) -> Any:
    """The iterate of NAG; other optimizers keep it as their params."""
    states = jax.tree.leaves(
        state.opt_state, is_leaf=lambda s: isinstance(s, nag_jax.AccelerateState)
    )
    if any(isinstance(s, nag_jax.AccelerateState) for s in states):
        return nag_jax.eval_params(state.params, state.opt_state)
    return state.params


def next_stop(config: Any, step: int, steps_per_epoch: int, total: int) -> int:
    """The next step where something is logged, evaluated or saved.

    Always on the same grid, however often a run was interrupted: so the compiled programs are the
    same, and the numbers with them.
    """
    after = lambda period: (step // period + 1) * period
    periods = [steps_per_epoch, config.log_every, config.checkpoint_every]
    return min(total, *(after(period) for period in periods if period))


def is_best(task: tasks.Task, history: list[Row], step: int) -> bool:
    name = f"test_{task.score}"
    results = [row[name] for row in history if name in row]
    if not results or history[-1]["step"] != step or name not in history[-1]:
        return False
    sign = 1 if task.higher_is_better else -1
    return len(results) == 1 or sign * results[-1] > max(sign * r for r in results[:-1])


def refuse_nonfinite(config: Any, state: steps.TrainState, step: int) -> None:
    skipped = int(state.skipped)
    if skipped and config.nonfinite == "stop":
        raise UserError(
            f"the loss or its gradient was not finite in {skipped} steps before step {step}; the "
            f"last checkpoint is from before; try, in another --workdir, a learning rate below "
            f"{config.learning_rate:g}, --config.clip_norm=1.0, or --config.nonfinite=skip"
        )


def over_devices(config: Any) -> tuple[NamedSharding, Any]:
    """Where whole arrays go, and what splits a batch over all devices."""
    devices = jax.devices()[: config.devices or None]
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    constrain = lambda batch: jax.lax.with_sharding_constraint(batch, rows)
    return NamedSharding(mesh, PartitionSpec()), constrain


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser, with one line instead of a traceback."""
    logging.set_verbosity(logging.WARNING)
    try:
        rest = flags.FLAGS(arguments)
        flags.FLAGS.config.keys()  # raises what went wrong when the file was loaded
        return rest
    except Exception as error:  # ml_collections raises many kinds for a wrong field or value
        message = str(error)
        if message[:1] in ("'", '"'):  # ml_collections repeats the text of a KeyError
            name, _, hint = ast.literal_eval(message).partition("\n")
            hint = hint or "configs/default.py lists all fields"
            message = f"the config has no field {name}; {hint}"
        sys.exit(f"error: {' '.join(message.split())}")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {' '.join(arguments[1:])}; options begin with --")
    logging.set_verbosity(logging.FATAL)  # orbax tells of a full disk in a hundred lines
    sys.unraisablehook = lambda unraisable: None  # and tensorstore of what nobody waits for
    try:
        train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        sys.exit(f"{interrupted}; saved; the same command goes on from there")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: threads of orbax may still be writing


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with the run's config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the run's metrics and checkpoints.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
