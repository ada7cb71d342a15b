"""The task that ``config.task`` names."""

from typing import Any

import jax

from examples.trainer.data.datasets import Dataset, kind
from examples.trainer.errors import UserError
from examples.trainer.tasks.adversarial import Adversarial
from examples.trainer.tasks.language import LanguageModel
from examples.trainer.tasks.supervised import Classification, Regression
from examples.trainer.tasks.task import Task

_TASKS = {
    "classification": Classification,
    "regression": Regression,
    "language": LanguageModel,
    "adversarial": Adversarial,
}


def make_task(config: Any, dataset: Dataset, key: jax.Array) -> Task:
    """The task that ``config.task`` names."""
    if config.task not in _TASKS:
        raise UserError(f"config.task must be one of {', '.join(_TASKS)}, got {config.task!r}")
    task, found = _TASKS[config.task], kind(dataset)
    if found not in task.learns_from:
        raise UserError(
            f"config.task={config.task} needs {' or '.join(task.learns_from)}, "
            f"config.dataset={config.dataset} has {found}; use a config for this kind of data"
        )
    return task(config, dataset, key)
