"""The compiled parts of training: one update, many updates, the order of the samples."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
    optimizer: optax.GradientTransformationExtraArgs,
    accumulate: int,
    constrain: Callable[[Batch], Batch],
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns ``(state, batch) -> state``: one update from one batch.

    ``constrain`` shards the batch over the devices. The gradients of ``accumulate`` micro-batches
    are summed one after the other, so the update is that of the whole batch. An update whose loss
    or gradient is not finite changes only the step and ``skipped``.

    Why not ``nag_jax.train_step``? It averages metrics, and this log needs exact sums. It also
    accumulates on each device separately; here BatchNorm sees the rows of all devices, so results
    do not depend on the number of devices. The price is that with several devices the gradients
    are reduced once per micro-batch instead of once per update.
    """

    def gradients(params: Any, rest: Any, batch: Batch) -> tuple[Any, Any, Sums]:
        grads, (rest, sums) = jax.grad(task.losses, has_aux=True)(params, rest, constrain(batch))
        return grads, rest, sums

    def accumulated(params: Any, rest: Any, batch: Batch) -> tuple[Any, Any, Sums]:
        if accumulate == 1:
            return gradients(params, rest, batch)
        # Each micro-batch takes every accumulate-th row, so that it is spread over the devices as
        # the batch is.
        split = lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        micro = jax.tree.map(split, batch)

        def add(carry: Any, batch: Batch) -> tuple[Any, None]:
            total, rest, totals = carry
            grads, rest, sums = gradients(params, rest, batch)
            total, totals = jax.tree.map(jnp.add, (total, totals), (grads, sums))
            return (total, rest, totals), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(gradients, params, rest, first)
        total, _, totals = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, (total, rest, totals), micro)[0]

    def update(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch = task.prepare(batch, key)
        grads, rest, sums = accumulated(state.params, state.rest, batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["samples"], 1.0), grads)
        finite = jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(sums["loss"])

        def changed() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            added = jax.tree.map(jnp.add, state.sums, sums)
            return state._replace(params=params, rest=rest, opt_state=opt_state, sums=added)

        kept = state._replace(skipped=state.skipped + 1)
        return select(finite, changed, kept)._replace(step=state.step + 1)

    return update


def select(condition: jax.Array, new: Callable[[], TrainState], old: TrainState) -> TrainState:
    """``new()`` where the condition holds, else ``old``."""
    # On CPU a branch is free and a select of all arrays is not. On an accelerator a branch makes
    # the device wait for the host.
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, new, lambda: old)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new(), old)


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
