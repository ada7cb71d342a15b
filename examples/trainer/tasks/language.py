"""Language modelling with characters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.tasks.gru import GRU
from examples.trainer.tasks.task import Batch, Sums, Task
from examples.trainer.tasks.transformer import Transformer


class LanguageModel(Task):
    """Next-character cross-entropy in nats, and its exponential, the perplexity."""

    learns_from = ("text",)

    def __init__(self, config: Any, dataset: Dataset, key: jax.Array):
        self.names = dataset.names
        super().__init__(language_model(config.model, len(self.names), nnx.Rngs(key)))

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
        """Draws a text, one character at a time."""
        model = self.model(params, rest, train=False)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            code, state = carry
            logits, state = model(code[:, None], state)
            code = jax.random.categorical(key, logits[:, 0])
            return (code, state), code[0]

        start = jnp.zeros(1, int), model.initial_state(1)
        _, codes = jax.lax.scan(step, start, jax.random.split(key, length))
        return "".join(self.names[code] for code in jax.device_get(codes))


def language_model(model: Any, symbols: int, rngs: nnx.Rngs) -> GRU | Transformer:
    """The model that ``config.model`` names, of texts with ``symbols`` different characters."""
    if model.name == "gru":
        return GRU(symbols, model.embedding, model.hidden, rngs=rngs)
    if model.name == "transformer":
        return Transformer(symbols, model.length, model.width, model.heads, model.blocks, rngs=rngs)
    raise UserError(f"config.model.name={model.name!r} cannot do text: use gru or transformer")
