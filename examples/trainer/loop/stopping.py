"""Runs that learn no more: when to end them or to lower the learning rate.

All of it follows from the rows of the run alone, so that one that was interrupted decides alike.
"""

from typing import Any

import jax
import numpy as np

from examples.trainer.run.reporting import Row
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.tasks import Task


def is_wanted(config: Any) -> bool:
    """Whether the config asks for any of it."""
    return bool(config.plateau.patience or config.stop.patience or config.stop.target is not None)


def reason_to_end(config: Any, task: Task, history: list[Row]) -> str:
    """Why ``config.stop`` ends the run after these rows; empty if it goes on."""
    stop, sign = config.stop, 1 if task.higher_is_better else -1
    found = results(task, history)
    if stop.target is not None and found and max(found) >= sign * stop.target:
        return f"test_{task.score} has reached {stop.target:g}"
    if stop.patience and waited(found, stop.min_change) >= stop.patience:
        return f"no better test_{task.score} in {stop.patience} evaluations"
    return ""


def learning_rate_scale(config: Any, task: Task, history: list[Row]) -> float:
    """The product of all reductions by ``config.plateau`` after these rows."""
    plateau = config.plateau
    if not plateau.patience:
        return 1.0
    found, reductions, since = results(task, history), 0, 0
    for i in range(1, len(found) + 1):
        # One that is better than all before, those before the last reduction too, starts anew.
        since = 0 if waited(found[:i], plateau.min_change) == 0 else since + 1
        if since == plateau.patience:
            reductions, since = reductions + 1, 0
    return plateau.factor**reductions


def results(task: Task, history: list[Row]) -> list[float]:
    """The test results so far, with the sign that makes the larger the better."""
    name, sign = f"test_{task.score}", 1 if task.higher_is_better else -1
    return [sign * row[name] for row in history if name in row]


def waited(found: list[float], min_change: float) -> int:
    """How many results came since the last that was better by more than ``min_change``."""
    best, last = float("-inf"), -1
    for i, result in enumerate(found):
        if result > best + (min_change if i else 0.0):
            best, last = result, i
    return len(found) - 1 - last


def with_scale(config: Any, state: TrainState, scale: float) -> TrainState:
    """The state with another factor on the learning rate; nothing is compiled anew."""
    if not config.plateau.patience:
        return state
    old = state.opt_state.hyperparams["scale"]
    new = jax.device_put(np.full(old.shape, scale, old.dtype), old.sharding)
    hyperparams = state.opt_state.hyperparams | {"scale": new}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
