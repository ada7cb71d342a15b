"""The state of a run, as checkpoints hold it."""

from typing import Any, NamedTuple

import jax

from examples.trainer.tasks.tasks import Sums


class TrainState(NamedTuple):
    """Everything that changes during training; with the data's position, all of a checkpoint."""

    step: jax.Array  # shape=(), dtype=int32: updates made, left out ones included
    params: Any  # where gradients are taken
    rest: Any  # BatchNorm statistics
    opt_state: Any
    key: jax.Array  # shape=(2,), dtype=uint32: of shuffling, augmentation and noise
    sums: Sums  # metrics since the last row of the log
    skipped: jax.Array  # shape=(), dtype=int32: updates left out as not finite
