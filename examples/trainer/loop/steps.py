"""The compiled parts of training: one update, many updates, the order of the samples."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nag_jax
from examples.trainer.cluster.layout import Layout
from examples.trainer.compiling import jit
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.task import Batch, Sums, Task


def initial_state(
    task: Task, optimizer: optax.GradientTransformation, key: jax.Array, batch: Batch
) -> TrainState:
    """The state before the first update; ``batch`` gives the shapes of a batch."""
    prepared = jax.eval_shape(task.prepare, batch, key)
    sums = jax.eval_shape(task.losses, task.params, task.rest, prepared)[1][1]
    zero = jnp.zeros([], jnp.int32)
    return TrainState(
        step=zero,
        params=task.params,
        rest=task.rest,
        opt_state=optimizer.init(task.params),
        key=jax.random.key_data(key),
        sums=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        skipped=jnp.copy(zero),
    )


def make_update(
    task: Task,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    layout: Layout,
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns ``(state, batch) -> state``: one update from one batch.

    Each device sums the gradients of its part of ``accumulate`` micro-batches one after the other,
    and the sums are reduced once, so the update is that of the whole batch. BatchNorm takes the
    statistics of a micro-batch over all devices, so results do not depend on their number. An
    update whose loss or gradient is not finite changes only the step and ``skipped``.
    """
    # With micro-batches the loss gets the rows of one device, otherwise the whole batch.
    axis = layout.axis if accumulate > 1 else None

    def loss_fn(params: Any, batch: Batch, model_state: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
        loss, (rest, sums) = task.losses(params, model_state, batch, axis)
        return loss / jnp.maximum(sums["samples"], 1.0), (rest, sums)

    step = nag_jax.train_step(
        loss_fn,
        optimizer,
        mesh=layout.mesh,
        axis=layout.axis,
        accumulate=accumulate,
        nonfinite="skip",
        has_aux=True,
        aux="sum",
        weight=lambda batch: jnp.sum(batch.get("weight", jnp.ones(len(batch["x"])))),
    )

    def update(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        before = nag_jax.StepState(
            opt_state=state.opt_state,
            model_state=state.rest,
            rng=None,
            steps=state.step,
            skipped=state.skipped,
            in_a_row=jnp.zeros_like(state.skipped),
        )
        params, after, metrics = step(state.params, before, task.prepare(batch, key))
        made = after.skipped == state.skipped
        add = lambda total, new: jnp.where(made, total + new, total)
        return state._replace(
            step=after.steps,
            params=params,
            rest=after.model_state,
            opt_state=after.opt_state,
            sums=jax.tree.map(add, state.sums, metrics.get("aux")),
            skipped=after.skipped,
        )

    return update


def make_run(
    update: Callable[[TrainState, Batch], TrainState],
    batch_size: int,
    steps_per_epoch: int,
    fusions: Sequence[str],
) -> Callable[[TrainState, Batch, jax.Array, int], TrainState]:
    """Returns ``(state, data, order, n) -> state`` after n updates on ``data`` in ``order``.

    ``fusions`` is for :func:`examples.trainer.compiling.jit`.
    """

    @functools.partial(jit, fusions=fusions, static_argnums=3, donate_argnums=0)
    def run(state: TrainState, data: Batch, order: jax.Array, n: int) -> TrainState:
        def one(state: TrainState, _: None) -> tuple[TrainState, None]:
            start = (state.step % steps_per_epoch) * batch_size
            indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
            return update(state, jax.tree.map(lambda x: x[indices], data)), None

        return one(state, None)[0] if n == 1 else jax.lax.scan(one, state, length=n)[0]

    return run


@functools.partial(jax.jit, static_argnums=2)
def epoch_order(key: jax.Array, epoch: int, samples: int) -> jax.Array:
    """The order of the samples in an epoch: a permutation that depends only on key and epoch."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
    return jax.random.permutation(jax.random.fold_in(key, 1), samples)
