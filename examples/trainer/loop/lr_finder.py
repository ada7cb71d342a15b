"""Suggests a learning rate: ``--config.find_lr=True``, instead of training.

Makes one update at each of a geometric series of learning rates, until the loss explodes (Smith,
Cyclical learning rates for training neural networks, 2015, arXiv:1506.01186, section 3.3).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError, expand
from examples.trainer.loop.feeds import Feed
from examples.trainer.loop.setup import set_up
from examples.trainer.loop.steps import make_update
from examples.trainer.optimizer import make_optimizer
from examples.trainer.options.values import check_config
from examples.trainer.run.state import TrainState
from examples.trainer.run.workdir import claim

_EXPLODED = 4.0  # the sweep ends at this multiple of the lowest smoothed loss
_SMOOTHING = 0.9  # weight of the past in the running mean of losses
_MARGIN = 4.0  # the suggestion is the rate of the lowest loss, divided by this


def find_learning_rate(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
    """Sweeps the learning rate, writes find_lr.json and find_lr.png, and returns the former.

    ``rates`` and ``losses`` are those of each update, ``smoothed`` is a running mean of the losses,
    and ``suggestion`` a quarter of the rate where that is lowest: the peak for a schedule.
    """
    check_config(config)
    workdir = expand(workdir)
    setup = set_up(config)
    claim(workdir, config)
    sweep = config.sweep
    ratio = (sweep.high / sweep.low) ** (1 / (sweep.steps - 1))
    optimizer = make_optimizer(
        config, setup.feed.steps_per_epoch, sweep.steps, lambda step: sweep.low * ratio**step
    ).transformation
    setup.feed.compile(make_update(setup.task, optimizer, config.accumulate, setup.layout))
    opt_state = setup.layout.put_whole(optimizer.init(setup.state.params))
    losses = sweep_losses(setup.feed, setup.state._replace(opt_state=opt_state), sweep.steps)
    found = suggest(sweep.low, ratio, losses)
    if processes.is_first():
        (workdir / "find_lr.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(workdir / "find_lr.png", found)
    lowest = int(np.argmin(found["smoothed"]))
    edge = " (the loss still falls: raise config.sweep.high)" if lowest == sweep.steps - 1 else ""
    processes.say(
        f"lowest loss at learning rate {found['rates'][lowest]:.3g}{edge}; suggestion: "
        f"--config.learning_rate={found['suggestion']:g}; curve in {workdir / 'find_lr.png'}"
    )
    return found


def suggest(low: float, ratio: float, losses: list[float]) -> dict[str, Any]:
    """The curve and the suggestion; UserError if the loss never falls."""
    rates, smoothed = low * ratio ** np.arange(len(losses)), running_mean(losses)
    lowest = int(np.argmin(smoothed)) if smoothed else 0
    if lowest == 0:
        raise UserError(
            f"the loss does not fall from config.sweep.low={low:g} upwards; set it lower"
        )
    suggestion = float(f"{rates[lowest] / _MARGIN:.2g}")
    return dict(suggestion=suggestion, rates=rates.tolist(), losses=losses, smoothed=smoothed)


def sweep_losses(feed: Feed, state: TrainState, most: int) -> list[float]:
    """The mean loss of each update, until it explodes."""
    losses: list[float] = []
    before = dict(loss=0.0, samples=0.0)
    for step in range(most):
        state = feed.advance(state, step, 1)
        sums = {name: float(value) for name, value in jax.device_get(state.sums).items()}
        samples = sums["samples"] - before["samples"]
        if samples == 0:  # the update was not finite and was skipped
            break
        loss = (sums["loss"] - before["loss"]) / samples
        if not math.isfinite(loss):
            break
        losses.append(loss)
        before = sums
        smoothed = running_mean(losses)
        if smoothed[-1] > _EXPLODED * min(smoothed):
            break
    feed.close()
    return losses


def running_mean(losses: list[float]) -> list[float]:
    """An exponentially weighted mean without a bias towards the start."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = _SMOOTHING * total + loss, _SMOOTHING * weight + 1
        means.append(total / weight)
    return means


def draw(path: Path, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    ax = figure.subplots()
    ax.semilogx(found["rates"], found["losses"], ".", ms=3, alpha=0.5, label="loss of the batch")
    ax.semilogx(found["rates"], found["smoothed"], label="running mean")
    suggestion = found["suggestion"]
    ax.axvline(suggestion, ls="--", color="k", lw=1, label=f"suggestion {suggestion:g}")
    top = _EXPLODED / 2 * min(found["smoothed"]) + max(found["smoothed"][:5])
    ax.set(xlabel="learning rate", ylabel="loss", ylim=(0, top))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120)
