"""Classification and regression."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.trainer.data.datasets import Dataset, kind
from examples.trainer.errors import UserError
from examples.trainer.tasks import augment
from examples.trainer.tasks.image_models import image_model
from examples.trainer.tasks.task import Batch, Sums, Task


class Classification(Task):
    """Softmax cross-entropy, and accuracy in percent."""

    score, higher_is_better = "accuracy", True
    learns_from = "images with labels", "rows of numbers with labels", "other arrays with labels"

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        self.names, self.augmentation = dataset.names, config.augment
        self.mean, self.std = dataset.mean, dataset.std
        shape, rngs = dataset.train["x"].shape[1:], nnx.Rngs(key)
        if len(shape) != 3 and any(
            (config.augment.flip, config.augment.shift, config.augment.zoom)
        ):
            raise UserError(
                f"config.augment is for images, config.dataset={config.dataset} has {kind(dataset)}"
                "; set its flip to False and its shift and zoom to 0"
            )
        super().__init__(image_model(config.model, shape, len(dataset.names), rngs))

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        x, a = batch["x"], self.augmentation
        keys = jax.random.split(key, 3)
        x = augment.random_flip(keys[0], x) if a.flip else x
        x = augment.random_shift(keys[1], x, a.shift)
        return batch | {"x": augment.random_zoom(keys[2], x, a.zoom)}

    def logits(self, model: Any, x: jax.Array) -> jax.Array:
        return model((x.astype(jnp.float32) - self.mean) / self.std)

    def score_batch(self, model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        logits, y = self.logits(model, batch["x"]), batch["y"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        weight = batch.get("weight", jnp.ones_like(losses))
        total = jnp.sum(losses * weight)
        correct = jnp.sum((logits.argmax(-1) == y) * weight)
        return total, {"loss": total, "correct": correct, "samples": weight.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return super().summarize(sums) | {"accuracy": 100 * sums["correct"] / sums["samples"]}


class Regression(Task):
    """Mean squared error of a scalar, and R2, the fraction of the variance that is explained."""

    score, higher_is_better = "r2", True
    learns_from = ("rows of numbers with targets",)

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        if config.model.name not in ("mlp", "linear"):
            raise UserError(
                f"config.model.name={config.model.name!r} cannot do regression: use mlp"
            )
        features = dataset.train["x"].shape[1]
        super().__init__(image_model(config.model, (features,), 1, nnx.Rngs(key)))

    def score_batch(self, model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        y = batch["y"]
        weight = batch.get("weight", jnp.ones_like(y))
        total = jnp.sum(weight * (model(batch["x"])[:, 0] - y) ** 2)
        moments = {"y": jnp.sum(weight * y), "y2": jnp.sum(weight * y**2)}
        return total, {"loss": total, "samples": weight.sum()} | moments

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        variance = sums["y2"] - sums["y"] ** 2 / sums["samples"]
        return super().summarize(sums) | {"r2": 1 - sums["loss"] / max(variance, 1e-12)}
