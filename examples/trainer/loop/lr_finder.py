"""Looks for a learning rate: ``--config.find_lr=True`` in place of training.

One update at each of a geometric series of learning rates, until the loss explodes (Smith, Cyclical
learning rates for training neural networks, 2015, arXiv:1506.01186, section 3.3).
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from examples.trainer import optimizer
from examples.trainer.cluster import processes
from examples.trainer.errors import UserError
from examples.trainer.loop import steps

_EXPLODED = 4.0  # times the lowest smoothed loss
_SMOOTHING = 0.9  # of the mean of losses, per update
_MARGIN = 4.0  # between the learning rate of the lowest loss and the one suggested


def find(config: Any, workdir: Path, setup: Any) -> dict[str, Any]:
    """Sweeps, writes find_lr.json and find_lr.png and returns what is in the first.

    ``rates`` and ``losses`` are those of each update, ``smoothed`` a running mean of the losses and
    ``suggestion`` a quarter of the rate where that is lowest: the peak for a schedule.
    """
    sweep = config.sweep
    ratio = (sweep.high / sweep.low) ** (1 / (sweep.steps - 1))
    rate = lambda step: sweep.low * ratio**step
    maker = optimizer.make(config, setup.feed.steps_per_epoch, sweep.steps, rate)
    update = steps.make_update(
        setup.task, maker.transformation, config.accumulate, setup.layout.constrain
    )
    setup.feed.compile(update)
    opt_state = setup.layout.put_whole(maker.transformation.init(setup.state.params))
    losses = sweep_losses(setup.feed, setup.state._replace(opt_state=opt_state), sweep.steps)
    rates = sweep.low * ratio ** np.arange(len(losses))
    smoothed = running_mean(losses)
    lowest = int(np.argmin(smoothed)) if smoothed else 0
    if lowest == 0:
        raise UserError(f"the loss never falls from config.sweep.low={sweep.low:g} on; start lower")
    suggestion = float(f"{rates[lowest] / _MARGIN:.2g}")
    found = dict(suggestion=suggestion, rates=rates.tolist(), losses=losses, smoothed=smoothed)
    if processes.is_first():
        (workdir / "find_lr.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(workdir / "find_lr.png", found)
    edge = " (the loss still falls: raise config.sweep.high)" if lowest == sweep.steps - 1 else ""
    processes.say(
        f"lowest loss at learning rate {rates[lowest]:.3g}{edge}; suggestion: "
        f"--config.learning_rate={suggestion:g}; curve in {workdir / 'find_lr.png'}"
    )
    return found


def sweep_losses(feed: Any, state: steps.TrainState, most: int) -> list[float]:
    """The mean loss of each update, up to the one where it explodes."""
    losses: list[float] = []
    before = dict(loss=0.0, samples=0.0)
    for step in range(most):
        state = feed.advance(state, step, 1)
        sums = {name: float(value) for name, value in jax.device_get(state.sums).items()}
        samples = sums["samples"] - before["samples"]
        if samples == 0:  # left out: not finite
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
    """Exponentially weighted, without a bias towards the start."""
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
