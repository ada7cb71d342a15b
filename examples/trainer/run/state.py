"""The state of a run, as checkpoints hold it."""

from typing import Any, NamedTuple

import jax

from examples.trainer.tasks.task import Sums


class TrainState(NamedTuple):
    """Everything that changes during training, except the position in streamed data."""

    step: jax.Array  # shape=(), dtype=int32: updates made, including skipped ones
    params: Any  # where gradients are taken
    rest: Any  # BatchNorm statistics
    opt_state: Any
    key: jax.Array  # shape=(2,), dtype=uint32: for shuffling, augmentation and noise
    sums: Sums  # of metrics, since the last row of the log
    skipped: jax.Array  # shape=(), dtype=int32: updates skipped as not finite
