"""The step ``-learning_rate * gradient``, as one link of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import cast_like, map_gradients, wide


def descent(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_learning_rate``, whose state is that of a schedule for a number, too.

    So a checkpoint can be read whichever way the learning rate is given.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params, extra_args
        updates = scaled(updates, -at_count(learning_rate, state.count))
        return updates, optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def at_count(value: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """The number, or the schedule's value at the int32 step that optax's own links give it."""
    return value(count) if callable(value) else value


def scaled(updates: optax.Updates, by: Any) -> optax.Updates:
    """``by`` times the updates, computed in float32 at least, in their dtypes."""
    return map_gradients(lambda u: cast_like(jnp.asarray(by, wide(u).dtype) * wide(u), u), updates)
