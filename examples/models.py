"""The models of the examples, in flax.nnx."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with ReLU between them: images ``[batch, ...]`` -> logits."""

    def __init__(self, inputs: int, hidden_sizes: Sequence[int], outputs: int, *, rngs: nnx.Rngs):
        sizes = [inputs, *hidden_sizes, outputs]
        initializer = nnx.initializers.he_normal()
        self.layers = nnx.List(
            nnx.Linear(m, n, kernel_init=initializer, rngs=rngs) for m, n in pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)
