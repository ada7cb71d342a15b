"""The step ``-learning_rate * gradient`` as a link of a chain."""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import cast_like, map_gradients, wide
from nag_jax._types import Scalar, transformation


def descent(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_learning_rate`` with the same state for a number as for a schedule.

    A checkpoint can then be restored whichever way the learning rate is given.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params, extra_args
        count = jnp.asarray(state.count)
        updates = scaled(updates, -at_count(learning_rate, count))
        # safe_increment stays at the largest int32; a sum would wrap to negative steps.
        return updates, optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(count)))

    return transformation(init, update)


def at_count(value: optax.ScalarOrSchedule, count: jax.Array) -> Scalar:
    """The number, or the schedule's value at the int32 step, as optax's own links compute it."""
    return cast(Scalar, value(count)) if callable(value) else value


def scaled(updates: optax.Updates, by: Scalar) -> optax.Updates:
    """The updates times ``by``, computed in at least float32, in their own dtypes."""
    return map_gradients(lambda u: cast_like(jnp.asarray(by, wide(u).dtype) * wide(u), u), updates)
