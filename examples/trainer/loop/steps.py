"""The compiled parts of training: one update, many updates, evaluation, BatchNorm statistics."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nag_jax
from examples.trainer.compiling import jit
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.image_models import BATCH_NORM_MOMENTUM
from examples.trainer.tasks.tasks import Batch, Sums, Task


def initial_state(
    task: Task, optimizer: optax.GradientTransformation, key: jax.Array, batch: Batch
) -> TrainState:
    """The state before the first update; ``batch`` shows what a batch looks like."""
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
    """One update from one batch. ``constrain`` shards the batch over the devices.

    The gradients of ``accumulate`` micro-batches are summed one after the other, so the update is
    that of the whole batch. An update whose loss or gradient is not finite changes only the step
    and ``skipped``.

    It is not ``nag_jax.train_step``: that averages what is to be logged, where sums of a log have
    to be exact, and accumulates on each device apart, where BatchNorm here sees all devices' rows
    and gives the same numbers on any number of them. The price: with several devices gradients are
    reduced for each micro-batch, not once for the update.
    """

    def gradients(params: Any, rest: Any, batch: Batch) -> tuple[Any, Any, Sums]:
        grads, (rest, sums) = jax.grad(task.losses, has_aux=True)(params, rest, constrain(batch))
        return grads, rest, sums

    def accumulated(params: Any, rest: Any, batch: Batch) -> tuple[Any, Any, Sums]:
        if accumulate == 1:
            return gradients(params, rest, batch)
        # Each takes every accumulate-th row, so that it is spread over the devices as the batch is.
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
    # On CPU a branch is free, a select of all arrays is not; elsewhere a branch waits for the host.
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, new, lambda: old)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new(), old)


def make_run(
    update: Callable[[TrainState, Batch], TrainState],
    batch_size: int,
    steps_per_epoch: int,
    fusions: Sequence[str],
) -> Callable[[TrainState, Batch, jax.Array, int], TrainState]:
    """``(state, data, order, n) -> state`` after n updates on samples of ``data`` in ``order``.

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
    """The order of the samples in an epoch: a permutation that depends on key and epoch alone."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
    return jax.random.permutation(jax.random.fold_in(key, 1), samples)


def evaluation_params(params: Any, opt_state: Any) -> Any:
    """The iterate of NAG; other optimizers keep it as their params."""
    keeps_it = lambda s: isinstance(s, nag_jax.AccelerateState | nag_jax.OuterState)
    if any(map(keeps_it, jax.tree.leaves(opt_state, is_leaf=keeps_it))):
        return nag_jax.eval_params(params, opt_state)
    return params


def make_evaluate(task: Task, batch_size: int) -> Callable[[Any, Any, Batch], Sums]:
    """``(params, rest, data) -> sums`` over every sample, the last batch padded."""

    @functools.partial(jit, static_argnums=4)
    def evaluate_batch(params: Any, rest: Any, data: Batch, start: int, size: int) -> Sums:
        samples = len(data["x"])
        indices = start + jnp.arange(size)
        batch = jax.tree.map(lambda x: x[jnp.minimum(indices, samples - 1)], data)
        weight = (indices < samples).astype(jnp.float32)
        return task.evaluate(params, rest, batch | {"weight": weight})

    def evaluate(params: Any, rest: Any, data: Batch) -> Sums:
        samples = len(data["x"])
        size = min(batch_size, samples)
        parts = [
            evaluate_batch(params, rest, data, start, size) for start in range(0, samples, size)
        ]
        return jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts)), *parts)

    return evaluate


def make_refresh(task: Task, batch_size: int, batches: int = 20) -> Callable[[Any, Batch], Any]:
    """``(params, data) -> rest``: BatchNorm statistics of ``params``, from training samples.

    The running averages of training belong to the points where gradients were taken; another
    iterate needs its own before it is evaluated.
    """
    if not jax.tree.leaves(task.rest):
        return lambda params, data: task.rest
    zeros = jax.tree.map(jnp.zeros_like, task.rest)

    @jit
    def fresh(params: Any, data: Batch, start: int) -> Any:
        size = min(batch_size, len(data["x"]))
        batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), data)
        batch = task.prepare(batch, jax.random.key(0))
        rest = task.losses(params, zeros, batch)[1][0]
        # From zero one update of the running average leaves (1 - momentum) * statistic.
        return jax.tree.map(lambda x: x / (1 - BATCH_NORM_MOMENTUM), rest)

    def refresh(params: Any, data: Batch) -> Any:
        count = min(batches, max(len(data["x"]) // batch_size, 1))
        parts = [fresh(params, data, i * batch_size) for i in range(count)]
        return jax.tree.map(lambda *parts: jnp.mean(jnp.stack(parts), axis=0), *parts)

    return refresh
