"""Checks what ``examples.trainer.diloco`` cannot run, before the first line of its table."""

from typing import Any

import jax

from examples.trainer.cluster.layout import device_count
from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.options.values import check_values
from examples.trainer.tasks.task import Task

_INF = float("inf")
_BELOW = {"learning_rate": _INF, "outer_learning_rate": _INF, "outer_momentum": 1.0}


def check_workers(config: Any) -> None:
    """UserError for a value that no worker can use."""
    check_values(config)
    if "local" not in config:
        raise UserError("the config has no group config.local; use configs/diloco.py")
    local = config.local
    if local.mode not in ("vmap", "shard_map"):
        raise UserError(f"config.local.mode must be vmap or shard_map, got {local.mode!r}")
    if local.workers < 1:
        raise UserError(f"config.local.workers must be at least 1, got {local.workers}")
    if local.workers > device_count() and local.mode == "shard_map":
        raise UserError(
            f"config.local.workers={local.workers} is more than the {device_count()} devices; "
            f"on CPU set JAX_NUM_CPU_DEVICES={local.workers}, or use --config.local.mode=vmap"
        )
    if not local.every or not all(isinstance(n, int) and n > 0 for n in local.every):
        raise UserError(f"config.local.every must be positive ints, got {local.every}")
    if any(max(local.every) % every for every in local.every):
        raise UserError(f"config.local.every={local.every} must divide the largest of them")
    for name, high in _BELOW.items():
        if not 0 <= local[name] < high:
            raise UserError(f"config.local.{name} must be in [0, {high:g}), got {local[name]:g}")
    if config.dataset == "shards" or config.task == "adversarial":
        refused = "dataset=shards" if config.dataset == "shards" else "task=adversarial"
        raise UserError(f"config.{refused} is for examples.trainer only")


def check_sizes(config: Any, dataset: Dataset) -> None:
    """UserError if the samples do not suffice for one round of the largest H per worker."""
    workers, most = config.local.workers, max(config.local.every)
    share, size = len(dataset.train["x"]) // workers, config.batch_size // workers
    if config.batch_size % workers or not 0 < size <= share:
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of "
            f"config.local.workers={workers}, for {share} samples each at most"
        )
    steps = config.num_epochs * (share // size)
    if steps < most:
        raise UserError(
            f"config.num_epochs={config.num_epochs} makes {steps} steps, fewer than the {most} of "
            f"config.local.every={config.local.every}; raise the first or lower the second"
        )


def check_task(config: Any, task: Task) -> None:
    """UserError for a model with BatchNorm, whose statistics would never be updated."""
    if jax.tree.leaves(task.rest):
        raise UserError(
            f"config.model.name={config.model.name} has BatchNorm: use examples.trainer"
        )
