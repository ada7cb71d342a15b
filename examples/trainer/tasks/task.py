"""What every task has: a model, its loss and its metrics.

``losses(params, rest, batch)`` returns the *sum* of the losses over the batch, the new ``rest``
(BatchNorm statistics) and sums of metrics over samples, one of which is ``samples``. Sums of
micro-batches therefore add up to those of the whole batch. Where each device of a mapped ``axis``
has its own rows of a batch, BatchNorm takes its statistics over the axis.
"""

from typing import Any

import jax
from flax import nnx

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class Task:
    """Holds the definition of the model; its arrays are passed in and out."""

    score = "loss"  # the metric that decides which checkpoint is the best
    higher_is_better = False
    learns_from: tuple[str, ...] = ()  # kinds of data; see choose.kind

    def __init__(self, model: nnx.Module):
        model.train()
        self.train_graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        model.eval()
        self.eval_graph = nnx.graphdef(model)

    def model(self, params: Any, rest: Any, *, train: bool, axis: str | None = None) -> Any:
        """The model; with ``axis`` BatchNorm takes its statistics over that mapped axis."""
        graph = self.train_graph if train else self.eval_graph
        model = nnx.merge(graph, params, rest, copy=True)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.axis_name = axis
        return model

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Prepares a training batch: augmentation, noise."""
        del key
        return batch

    def losses(
        self, params: Any, rest: Any, batch: Batch, axis: str | None = None
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        model = self.model(params, rest, train=True, axis=axis)
        loss, sums = self.score_batch(model, batch)
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), sums)

    def evaluate(self, params: Any, rest: Any, batch: Batch) -> Sums:
        return self.score_batch(self.model(params, rest, train=False), batch)[1]

    def score_batch(self, model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        """The sum of the losses, and sums of metrics. Batches may have a ``weight`` per sample."""
        raise TypeError(f"{type(self).__name__} has no score_batch")

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a row of the log, from sums over samples."""
        return {"loss": sums["loss"] / sums["samples"]}
