"""The deep autoencoder of Sutskever et al. 2013 on images of curves, at a smaller size."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

INCOMING = 15  # connections of a unit that do not start at 0 ("sparse initialization")


def images(count: int, side: int, seed: int) -> np.ndarray:
    """``[count, side**2]`` float32 in [0, 1]: each a curve that three random points define.

    As the data of Hinton and Salakhutdinov 2006, which the 2013 paper trains on; here the points
    are those of a quadratic Bezier curve, drawn with a soft pen.
    """
    points = np.random.default_rng(seed).uniform(0.1, 0.9, (count, 3, 2))
    t = np.linspace(0, 1, 3 * side)[:, None]
    weights = np.concatenate([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    line = np.einsum("tp,npd->ntd", weights, points)
    centers = (np.arange(side) + 0.5) / side
    distance = (line[..., None] - centers) ** 2  # [count, time, axis, side]
    squared = distance[:, :, 0, :, None] + distance[:, :, 1, None, :]
    pen = 0.6 / side
    return np.exp(-squared.min(1) / (2 * pen**2)).reshape(count, -1).astype(np.float32)


def start(sizes: tuple[int, ...], seed: int) -> Any:
    """Layers ``(kernel, bias)``: normal weights on at most INCOMING inputs of each unit."""
    rng = np.random.default_rng(seed)
    layers = []
    for m, n in pairwise((*sizes, *sizes[-2::-1])):
        order = rng.permuted(np.tile(np.arange(m), (n, 1)), axis=1).T
        kernel = rng.standard_normal((m, n)) * (order < INCOMING)
        layers.append((jnp.asarray(kernel, jnp.float32), jnp.zeros(n)))
    return layers


def logits(layers: Any, x: jax.Array) -> jax.Array:
    """Sigmoid units throughout, but for the code in the middle, which is linear."""
    last, middle = len(layers) - 1, len(layers) // 2 - 1
    for index, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias[None]
        if index not in (last, middle):
            x = jax.nn.sigmoid(x)
    return x


def losses(layers: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over images: cross-entropy above its lowest value, and squared error."""
    out = logits(layers, x)
    least = jax.scipy.special.entr(x) + jax.scipy.special.entr(1 - x)
    entropy = jnp.sum(optax.sigmoid_binary_cross_entropy(out, x) - least, -1)
    return jnp.mean(entropy), jnp.mean(jnp.sum((jax.nn.sigmoid(out) - x) ** 2, -1))
