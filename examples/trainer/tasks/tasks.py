"""What is learned: a model, its loss and its metrics, the same four methods for each task.

``losses(params, rest, batch)`` returns the *sum* of the losses over the batch, the new ``rest``
(BatchNorm statistics) and sums of metrics over samples, among them ``samples``: so that sums of
micro-batches add up to those of the batch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.tasks import augment, image_models
from examples.trainer.tasks.gru import GRU

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class Task:
    """Holds the model's definition; its arrays are passed in and out."""

    score = "loss"  # the metric that tells the best checkpoint
    higher_is_better = False
    learns_from: tuple[str, ...] = ()  # see kind

    def __init__(self, model: nnx.Module):
        model.train()
        self.train_graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        model.eval()
        self.eval_graph = nnx.graphdef(model)

    def model(self, params: Any, rest: Any, *, train: bool) -> Any:
        graph = self.train_graph if train else self.eval_graph
        return nnx.merge(graph, params, rest, copy=True)

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """What a training batch goes through first: augmentation, noise."""
        del key
        return batch

    def losses(self, params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, tuple[Any, Sums]]:
        model = self.model(params, rest, train=True)
        loss, sums = self.score_batch(model, batch)
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), sums)

    def evaluate(self, params: Any, rest: Any, batch: Batch) -> Sums:
        return self.score_batch(self.model(params, rest, train=False), batch)[1]

    def score_batch(self, model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        raise TypeError(f"{type(self).__name__} has no score_batch")

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of a run's log from sums over samples."""
        return {"loss": sums["loss"] / sums["samples"]}


class Classification(Task):
    """Softmax cross-entropy; accuracy in percent. Batches may carry a ``weight`` per sample."""

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
    """Mean squared error of a scalar, and R2: the share of the variance that is explained."""

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


class LanguageModel(Task):
    """Next-character cross-entropy in nats, and perplexity: its exponential."""

    learns_from = ("text",)

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        if config.model.name != "gru":
            raise UserError(f"config.model.name={config.model.name!r} cannot do text: use gru")
        self.names, model = dataset.names, config.model
        rngs = nnx.Rngs(key)
        super().__init__(GRU(len(self.names), model.embedding, model.hidden, rngs=rngs))

    def score_batch(self, model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        codes = batch["x"]
        logits, _ = model(codes[:, :-1], model.initial_state(len(codes)))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:])
        weight = batch.get("weight", jnp.ones(len(codes)))[:, None]
        total = jnp.sum(losses * weight)
        return total, {"loss": total, "samples": weight.sum() * losses.shape[1]}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["samples"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def sample(self, params: Any, rest: Any, key: jax.Array, length: int) -> str:
        """Draws a text, one character after the other."""
        model = self.model(params, rest, train=False)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            code, state = carry
            logits, state = model(code[:, None], state)
            code = jax.random.categorical(key, logits[:, 0])
            return (code, state), code[0]

        start = jnp.zeros(1, int), model.initial_state(1)
        _, codes = jax.lax.scan(step, start, jax.random.split(key, length))
        return "".join(self.names[code] for code in jax.device_get(codes))


class Adversarial(Task):
    """A DCGAN (Goodfellow et al. 2014, non-saturating loss; Radford et al. 2015).

    One gradient serves both players: each sees the other through stop_gradient.
    """

    learns_from = ("images with labels",)

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        if config.model.name != "dcgan":
            raise UserError(f"config.model.name={config.model.name!r} cannot generate: use dcgan")
        self.latent, shape = config.model.latent, dataset.train["x"].shape[1:]
        if shape[0] % 4 or shape[1] % 4:
            raise UserError(f"dcgan needs images with sides divisible by 4, got {shape[:2]}")
        rngs = nnx.Rngs(key)
        generator = image_models.Generator(self.latent, config.model.width, shape, rngs=rngs)
        discriminator = image_models.Discriminator(config.model.width, shape, rngs=rngs)
        super().__init__(nnx.Dict(generator=generator, discriminator=discriminator))

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        return batch | {"z": jax.random.normal(key, (len(batch["x"]), self.latent))}

    def losses(self, params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, tuple[Any, Sums]]:
        fixed = jax.lax.stop_gradient
        playing, judging = (
            self.model(params, rest, train=True),
            self.model(params, rest, train=True),
        )
        still = self.model(fixed(params), rest, train=True)
        fake = playing["generator"](batch["z"])
        real = batch["x"].astype(jnp.float32) / 127.5 - 1
        weight = batch.get("weight", jnp.ones(len(real)))
        bce = lambda logits, label: jnp.sum(
            weight * optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label))
        )
        fooling = bce(still["discriminator"](fake), 1.0)
        verdicts = judging["discriminator"](jnp.concatenate([real, fixed(fake)]))
        on_real, on_fake = jnp.split(verdicts, 2)
        judgement = bce(on_real, 1.0) + bce(on_fake, 0.0)
        right = jnp.sum(weight * ((on_real > 0) * 0.5 + (on_fake < 0) * 0.5))
        sums = {
            "loss": fooling + judgement,
            "generator_loss": fooling,
            "discriminator_loss": judgement,
            "right": right,
            "samples": weight.sum(),
        }
        rest = nnx.state(playing, nnx.Not(nnx.Param))
        return fooling + judgement, (rest, sums)

    def evaluate(self, params: Any, rest: Any, batch: Batch) -> Sums:
        """On real test images and images of a fixed noise."""
        key = jax.random.key(0)
        noisy = self.prepare(batch, key)
        return self.losses(params, rest, noisy)[1][1]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        names = ("loss", "generator_loss", "discriminator_loss")
        metrics = {name: sums[name] / sums["samples"] for name in names}
        return metrics | {"discriminator_accuracy": 100 * sums["right"] / sums["samples"]}

    def generate(self, params: Any, rest: Any, key: jax.Array, count: int) -> jax.Array:
        """``count`` images in [0, 1], from running BatchNorm statistics."""
        model = self.model(params, rest, train=False)
        return (model["generator"](jax.random.normal(key, (count, self.latent))) + 1) / 2


def image_model(model: Any, shape: tuple[int, ...], outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """The model that ``config.model`` names, for inputs of ``shape``."""
    if model.name in ("mlp", "linear"):
        hidden = model.hidden_sizes if model.name == "mlp" else ()
        return image_models.MLP(math.prod(shape), hidden, outputs, rngs=rngs)
    if model.name not in ("cnn", "resnet"):
        known = "linear, mlp, cnn, resnet (images), gru (text), dcgan (adversarial)"
        raise UserError(f"config.model.name must be one of {known}, got {model.name!r}")
    if len(shape) != 3 or min(shape[:2]) < 4:
        raise UserError(f"{model.name} needs images of at least 4 x 4 pixels, got {shape}")
    if model.name == "cnn":
        return image_models.CNN(shape, model.channels, model.hidden, outputs, rngs=rngs)
    return image_models.ResNet(shape, model.channels, model.blocks, outputs, rngs=rngs)


_TASKS = {
    "classification": Classification,
    "regression": Regression,
    "language": LanguageModel,
    "adversarial": Adversarial,
}


def make(config: Any, dataset: Dataset, key: jax.Array) -> Task:
    """The task that ``config.task`` names."""
    if config.task not in _TASKS:
        raise UserError(f"config.task must be one of {', '.join(_TASKS)}, got {config.task!r}")
    task, found = _TASKS[config.task], kind(dataset)
    if found not in task.learns_from:
        raise UserError(
            f"config.task={config.task} needs {' or '.join(task.learns_from)}, "
            f"config.dataset={config.dataset} has {found}; take the config that fits"
        )
    return task(config, dataset, key)


def kind(dataset: Dataset) -> str:
    """What of a data set decides which tasks can learn from it."""
    x, y = dataset.train["x"], dataset.train.get("y")
    if y is None:
        return "text"
    rows = "images" if x.ndim == 4 else "rows of numbers" if x.ndim == 2 else "other arrays"
    return f"{rows} with {'targets' if y.dtype.kind == 'f' else 'labels'}"
