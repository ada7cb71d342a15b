"""A decoder-only character model (Radford et al. 2019, GPT-2), in flax.nnx.

Queries, keys and values have a matrix each, so that optimizers of matrices, such as Muon, see them
separately.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Transformer(nnx.Module):
    """Maps codes ``[batch, time]`` and those before them to logits and the codes to remember.

    The state of a text is its last ``length`` codes, ``[batch, length]``; before its start they
    are 0. A call with ``length`` codes sees these alone.
    """

    def __init__(
        self, symbols: int, length: int, width: int, heads: int, blocks: int, *, rngs: nnx.Rngs
    ):
        self.length = length
        self.embed = nnx.Embed(symbols, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, blocks, rngs=rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, symbols, rngs=rngs)

    def initial_state(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.length), int)

    def __call__(self, codes: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = jnp.concatenate([state, codes], axis=1)[:, -self.length :]
        x = self.embed(seen) + self.positions(jnp.arange(self.length)[None])
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x[:, -codes.shape[1] :])), seen


class Block(nnx.Module):
    """Causal attention and a perceptron, each after a normalization and added to its input."""

    def __init__(self, width: int, heads: int, blocks: int, *, rngs: nnx.Rngs):
        self.heads = heads
        # What 2 * blocks layers add to each other then has the size of what one would add.
        last = nnx.initializers.variance_scaling(0.5 / blocks, "fan_in", "truncated_normal")
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        # Without biases: that of the keys would add the same to all scores, which has no effect.
        self.queries = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.keys = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.values = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.mixed = nnx.Linear(width, width, kernel_init=last, rngs=rngs)
        self.before_perceptron = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.output = nnx.Linear(4 * width, width, kernel_init=last, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.before_attention(x))
        return x + self.output(nnx.gelu(self.hidden(self.before_perceptron(x))))

    def attention(self, x: jax.Array) -> jax.Array:
        by_head = lambda layer: layer(x).reshape(*x.shape[:2], self.heads, -1)
        queries, keys, values = map(by_head, (self.queries, self.keys, self.values))
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return self.mixed(mixed.reshape(x.shape))
