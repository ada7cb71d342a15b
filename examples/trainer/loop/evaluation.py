"""Test results, at the iterate that the optimizer recommends and at the training parameters."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nag_jax
from examples.trainer.compiling import jit
from examples.trainer.loop.setup import Setup
from examples.trainer.run import plots
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.image_models import BATCH_NORM_MOMENTUM
from examples.trainer.tasks.task import Batch, Sums, Task


class Evaluation:
    """Evaluates states of one run on its whole test set."""

    def __init__(self, config: Any, workdir: Path, setup: Setup):
        self._setup, self._workdir = setup, workdir
        self._sums = make_evaluate(setup.task, config.eval_batch_size)
        self._refresh = make_refresh(setup.task, config.batch_size)

    def evaluate(self, state: TrainState, step: int) -> dict[str, Sums]:
        """Sums at the evaluation iterate ("test_") and at the training parameters ("params_")."""
        task, test = self._setup.task, self._setup.test
        params, rest = self._iterate(state)
        results = {
            "test_": self._sums(params, rest, test),
            "params_": self._sums(state.params, state.rest, test),
        }
        epoch = round(step / self._setup.feed.steps_per_epoch)
        plots.save_progress(self._workdir, task, params, rest, epoch)
        return results

    def save_results(self, state: TrainState) -> None:
        """Plots and tables of the trained model."""
        params, rest = self._iterate(state)
        plots.save_results(self._workdir, self._setup.task, params, rest, self._setup.test)

    def _iterate(self, state: TrainState) -> tuple[Any, Any]:
        params = nag_jax.eval_params(state.params, state.opt_state)
        return params, self._refresh(params, self._setup.feed.samples)


def make_evaluate(task: Task, batch_size: int) -> Callable[[Any, Any, Batch], Sums]:
    """Returns ``(params, rest, data) -> sums`` over every sample; the last batch is padded."""

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
    """Returns ``(params, data) -> rest``: BatchNorm statistics of ``params`` on training samples.

    The running averages of training belong to the points where gradients were taken. Another
    iterate needs new statistics before it is evaluated.
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
        # One update of a running average that starts at zero gives (1 - momentum) * statistic.
        return jax.tree.map(lambda x: x / (1 - BATCH_NORM_MOMENTUM), rest)

    def refresh(params: Any, data: Batch) -> Any:
        count = min(batches, max(len(data["x"]) // batch_size, 1))
        parts = [fresh(params, data, i * batch_size) for i in range(count)]
        return jax.tree.map(lambda *parts: jnp.mean(jnp.stack(parts), axis=0), *parts)

    return refresh
