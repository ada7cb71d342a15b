"""DiLoCo, with workers that average every H steps, compared with NAG that averages every gradient.

    python -m examples.trainer.diloco --config=configs/diloco.py

Each worker trains on its own part of the data. All runs use the same batches; they differ in how
often the workers communicate: one mean of a tree of the size of params every H steps.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

import nag_jax
from examples.trainer.compiling import jit
from examples.trainer.data import datasets
from examples.trainer.diloco.check import check_sizes, check_task, check_workers
from examples.trainer.loop.evaluation import make_evaluate
from examples.trainer.optimizer import make_optimizer
from examples.trainer.tasks.choose import make_task
from examples.trainer.tasks.task import Batch, Task

AXIS = "workers"


class Row(NamedTuple):
    """One line of the table; losses are those of the whole test set, in nats per character."""

    method: str
    every: int  # H, the steps between two means
    learning_rate: float  # peak, of the inner steps; NaN for nag_auto, which finds it
    loss: float  # at eval_params
    loss_at_params: float  # at the slow copy, after the last outer step
    bytes_per_step: float  # that each worker sends


def over_workers(function: Callable, mode: str, workers: int) -> Callable:
    """Maps ``function`` of one worker over stacks with a row per worker, along AXIS."""
    if mode == "vmap":
        return jax.vmap(function, axis_name=AXIS)
    mesh = jax.make_mesh((workers,), (AXIS,), axis_types=(AxisType.Auto,))
    row, rows = (lambda x: x[0]), (lambda x: x[None])
    one = lambda *stacks: jax.tree.map(rows, function(*jax.tree.map(row, stacks)))
    # Unchecked, because the GRU's first state is the same for all workers and later ones are not.
    spec = PartitionSpec(AXIS)
    return jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def make_rounds(
    task: Task, transformation: optax.GradientTransformationExtraArgs, synchronous: bool
) -> Callable:
    """``(params, opt_state, samples, order) -> (params, opt_state)`` of one worker.

    ``order``, int32 ``[rounds, H, batch]``, are positions in the worker's own samples.
    """

    def step(carry: Any, batch: Batch, sync: bool) -> Any:
        params, opt_state = carry
        gradient, (_, sums) = jax.grad(task.losses, has_aux=True)(params, task.rest, batch)
        gradient = jax.tree.map(lambda g: g / sums["samples"], gradient)
        if synchronous:
            gradient = jax.lax.pmean(gradient, AXIS)
        # ``sync`` is known at compile time, so the loop over inner steps contains no mean and no
        # branch.
        updates, opt_state = transformation.update(gradient, opt_state, params, sync=sync)
        return optax.apply_updates(params, updates), opt_state

    def rounds(params: Any, opt_state: Any, samples: Batch, order: jax.Array) -> Any:
        take = lambda indices: jax.tree.map(lambda x: x[indices], samples)

        def one(carry: Any, order: jax.Array) -> tuple[Any, None]:
            inner = lambda carry, indices: (step(carry, take(indices), False), None)
            carry, _ = jax.lax.scan(inner, carry, order[:-1])
            return step(carry, take(order[-1]), True), None

        return jax.lax.scan(one, (params, opt_state), order)[0]

    return rounds


def train(config: Any, dataset: datasets.Dataset, every: int, learning_rate: float) -> Row:
    """Trains with an outer step after every ``every`` steps; 0 is fully synchronous."""
    check_workers(config)
    check_sizes(config, dataset)
    local, synchronous = config.local, every == 0
    workers, every = local.workers, max(every, 1)
    share = len(dataset.train["x"]) // workers
    parts = lambda x: x[: share * workers].reshape(workers, share, *x.shape[1:])
    samples = jax.tree.map(parts, dataset.train)
    order = batches(config, share)

    task, transformation = make_worker(config, dataset, learning_rate, order.shape[1])
    if not synchronous:
        outside = dict(learning_rate=local.outer_learning_rate, momentum=local.outer_momentum)
        transformation = nag_jax.diloco(transformation, AXIS, every=every, **outside)

    copies = lambda x: jax.numpy.stack([x] * workers)
    state = jax.tree.map(copies, (task.params, transformation.init(task.params)))
    rounds = make_rounds(task, transformation, synchronous)
    advance = jit(
        over_workers(rounds, local.mode, workers), config.cpu_fusions, donate_argnums=(0, 1)
    )
    length = max(every, *local.every)
    for start in range(0, order.shape[1], length):
        part = order[:, start : start + length]
        state = advance(*state, samples, part.reshape(workers, -1, every, part.shape[-1]))

    params, opt_state = jax.tree.map(lambda x: x[0], jax.device_get(state))
    evaluate = make_evaluate(task, config.eval_batch_size)
    test = jax.device_put(dataset.test)
    name = "NAG" if config.optimizer.name == "nag" else config.optimizer.name
    sums = lambda params: jax.device_get(evaluate(params, task.rest, test))
    loss = lambda params: float(task.summarize(sums(params))["loss"])
    return Row(
        method=f"synchronous {name}" if synchronous else "DiLoCo",
        every=every,
        learning_rate=math.nan if name == "nag_auto" else learning_rate,
        loss=loss(nag_jax.eval_params(params, opt_state)),
        loss_at_params=loss(params),
        bytes_per_step=sum(4 * x.size for x in jax.tree.leaves(params)) / every,
    )


def make_worker(
    config: Any, dataset: datasets.Dataset, learning_rate: float, total_steps: int
) -> tuple[Task, optax.GradientTransformationExtraArgs]:
    """The task and the inner optimizer of a worker."""
    config = config.copy_and_resolve_references()
    config.learning_rate = learning_rate
    task = make_task(config, dataset, jax.random.key(config.seed))
    check_task(config, task)
    per_epoch = len(dataset.train["x"]) // config.local.workers * config.local.workers
    inner = make_optimizer(config, per_epoch // config.batch_size, total_steps)
    return task, inner.transformation


def batches(config: Any, share: int) -> np.ndarray:
    """int32 ``[workers, steps, batch]``: epochs of each worker over its own samples.

    All runs make the same number of steps, a multiple of the largest H.
    """
    workers, size = config.local.workers, config.batch_size // config.local.workers
    per_epoch = share // size
    rng = np.random.default_rng(config.seed)
    epoch = lambda: rng.permutation(share)[: per_epoch * size].reshape(per_epoch, size)
    orders = [[epoch() for _ in range(config.num_epochs)] for _ in range(workers)]
    order = np.stack([np.concatenate(epochs) for epochs in orders]).astype(np.int32)
    rounds = order.shape[1] // max(config.local.every)
    return order[:, : rounds * max(config.local.every)]


def table(config: Any) -> list[Row]:
    """Runs synchronously and then with each H; prints each row when it is finished."""
    check_workers(config)
    dataset, local = datasets.load(config), config.local
    check_sizes(config, dataset)
    make_worker(config, dataset, config.learning_rate, 1)  # errors come before the first line
    print(f"{'method':22} {'H':>4} {'peak lr':>8} {'loss':>7} {'at params':>10} {'bytes/step':>11}")
    rows = []
    for every in (0, *local.every):
        rate = local.learning_rate if every else config.learning_rate
        rows.append(train(config, dataset, every, rate))
        print("{:22} {:4} {:8g} {:7.4f} {:10.4f} {:11,.0f}".format(*rows[-1]), flush=True)
    return rows
