"""When to lower the learning rate, and when to end a run early.

Both depend only on the rows of the run, so a resumed run decides as the uninterrupted one would.
"""

from typing import Any

import jax
import numpy as np

from examples.trainer.run.reporting import Reporter, Row
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.task import Task


def react(config: Any, task: Task, state: TrainState, reporter: Reporter) -> tuple[TrainState, str]:
    """After an evaluation: the state with the new learning rate, and why to end, if at all."""
    if not is_wanted(config):
        return state, ""
    reporter.flush()  # waits for the device
    scale = learning_rate_scale(config, task, reporter.history)
    return with_scale(config, state, scale), reason_to_end(config, task, reporter.history)


def is_wanted(config: Any) -> bool:
    """Whether the config asks for reductions or an early end."""
    return bool(config.plateau.patience or config.stop.patience or config.stop.target is not None)


def reason_to_end(config: Any, task: Task, history: list[Row]) -> str:
    """Why ``config.stop`` ends the run after these rows; empty if it continues."""
    stop, sign = config.stop, 1 if task.higher_is_better else -1
    found = results(task, history)
    if stop.target is not None and found and max(found) >= sign * stop.target:
        return f"test_{task.score} has reached {stop.target:g}"
    if stop.patience and evaluations_since_best(found, stop.min_change) >= stop.patience:
        return f"no better test_{task.score} in {stop.patience} evaluations"
    return ""


def learning_rate_scale(config: Any, task: Task, history: list[Row]) -> float:
    """The product of all reductions by ``config.plateau`` after these rows."""
    plateau = config.plateau
    if not plateau.patience:
        return 1.0
    found, reductions, since = results(task, history), 0, 0
    for i in range(1, len(found) + 1):
        # Only a result better than all earlier ones, also those before the last reduction, resets
        # the count.
        is_best = evaluations_since_best(found[:i], plateau.min_change) == 0
        since = 0 if is_best else since + 1
        if since == plateau.patience:
            reductions, since = reductions + 1, 0
    return plateau.factor**reductions


def results(task: Task, history: list[Row]) -> list[float]:
    """The test results so far, negated if lower is better."""
    name, sign = f"test_{task.score}", 1 if task.higher_is_better else -1
    return [sign * row[name] for row in history if name in row]


def evaluations_since_best(found: list[float], min_change: float) -> int:
    """The number of results after the last one that was better by more than ``min_change``."""
    best, last = float("-inf"), -1
    for i, result in enumerate(found):
        if result > best + (min_change if i else 0.0):
            best, last = result, i
    return len(found) - 1 - last


def with_scale(config: Any, state: TrainState, scale: float) -> TrainState:
    """The state with a new factor on the learning rate; nothing is recompiled."""
    if not config.plateau.patience:
        return state
    old = state.opt_state.hyperparams["scale"]
    new = jax.device_put(np.full(old.shape, scale, old.dtype), old.sharding)
    hyperparams = state.opt_state.hyperparams | {"scale": new}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
