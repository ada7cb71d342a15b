"""Generative adversarial networks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.tasks.image_models import Discriminator, Generator
from examples.trainer.tasks.task import Batch, Sums, Task


class Adversarial(Task):
    """A DCGAN (Goodfellow et al. 2014, non-saturating loss; Radford et al. 2015).

    One gradient serves both networks: each loss holds the other network fixed (stop_gradient).
    """

    learns_from = ("images with labels",)

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        if config.model.name != "dcgan":
            raise UserError(f"config.model.name={config.model.name!r} cannot generate: use dcgan")
        self.latent, shape = config.model.latent, dataset.train["x"].shape[1:]
        if shape[0] % 4 or shape[1] % 4:
            raise UserError(f"dcgan needs images with sides divisible by 4, got {shape[:2]}")
        rngs = nnx.Rngs(key)
        generator = Generator(self.latent, config.model.width, shape, rngs=rngs)
        discriminator = Discriminator(config.model.width, shape, rngs=rngs)
        super().__init__(nnx.Dict(generator=generator, discriminator=discriminator))

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        return batch | {"z": jax.random.normal(key, (len(batch["x"]), self.latent))}

    def losses(
        self, params: Any, rest: Any, batch: Batch, axis: str | None = None
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        fixed = jax.lax.stop_gradient
        # Three copies, because each call of a network updates its BatchNorm statistics.
        generating = self.model(params, rest, train=True, axis=axis)
        judging = self.model(params, rest, train=True, axis=axis)
        unchanged = self.model(fixed(params), rest, train=True, axis=axis)
        fake = generating["generator"](batch["z"])
        real = batch["x"].astype(jnp.float32) / 127.5 - 1
        weight = batch.get("weight", jnp.ones(len(real)))
        bce = lambda logits, label: jnp.sum(
            weight * optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label))
        )
        fooling_loss = bce(unchanged["discriminator"](fake), 1.0)
        verdicts = judging["discriminator"](jnp.concatenate([real, fixed(fake)]))
        on_real, on_fake = jnp.split(verdicts, 2)
        judging_loss = bce(on_real, 1.0) + bce(on_fake, 0.0)
        right = jnp.sum(weight * ((on_real > 0) * 0.5 + (on_fake < 0) * 0.5))
        sums = {
            "loss": fooling_loss + judging_loss,
            "generator_loss": fooling_loss,
            "discriminator_loss": judging_loss,
            "right": right,
            "samples": weight.sum(),
        }
        rest = nnx.state(generating, nnx.Not(nnx.Param))
        return fooling_loss + judging_loss, (rest, sums)

    def evaluate(self, params: Any, rest: Any, batch: Batch) -> Sums:
        """Evaluates on real test images and on images from fixed noise."""
        key = jax.random.key(0)
        noisy = self.prepare(batch, key)
        return self.losses(params, rest, noisy)[1][1]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        names = ("loss", "generator_loss", "discriminator_loss")
        metrics = {name: sums[name] / sums["samples"] for name in names}
        return metrics | {"discriminator_accuracy": 100 * sums["right"] / sums["samples"]}

    def generate(self, params: Any, rest: Any, key: jax.Array, count: int) -> jax.Array:
        """Generates ``count`` images in [0, 1], with the running BatchNorm statistics."""
        model = self.model(params, rest, train=False)
        return (model["generator"](jax.random.normal(key, (count, self.latent))) + 1) / 2
