"""Models for images, in flax.nnx: NHWC inputs, logits as outputs."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.trainer.errors import UserError

_he = nnx.initializers.he_normal()


class MLP(nnx.Module):
    """Dense layers with ReLU between them: ``[batch, ...]`` -> ``[batch, outputs]``.

    Without hidden layers this is a linear model.
    """

    def __init__(self, inputs: int, hidden_sizes: Sequence[int], outputs: int, *, rngs: nnx.Rngs):
        sizes = [inputs, *hidden_sizes, outputs]
        self.layers = nnx.List(
            nnx.Linear(m, n, kernel_init=_he, rngs=rngs) for m, n in pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """Two stages of 3x3 convolution and 2x2 max-pooling, then two dense layers."""

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int], hidden: int, outputs: int,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        height, width, depth = shape
        self.stages = nnx.List(
            ConvolutionPool(m, n, rngs=rngs) for m, n in pairwise([depth, *channels])
        )
        flat = (height // 4) * (width // 4) * channels[-1]
        self.dense = nnx.Linear(flat, hidden, kernel_init=_he, rngs=rngs)
        self.logits = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in self.stages:
            x = stage(x)
        return self.logits(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


class ConvolutionPool(nnx.Module):
    """3x3 convolution, 2x2 max-pooling, bias, ReLU.

    Adding the bias after the pooling gives the same result with a quarter of the additions.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(
            inputs, outputs, (3, 3), use_bias=False, kernel_init=_he, rngs=rngs
        )
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(max_pool(convolve(self.convolution, x)) + self.bias[...][None, None, None])


def convolve(layer: nnx.Conv, x: jax.Array) -> jax.Array:
    """The output of the layer; for gray images, computed as a product with 3x3 patches.

    On CPU, the gradient of a convolution over one channel takes several times as long.
    """
    if x.shape[-1] > 1:
        return layer(x)
    batch, height, width, _ = x.shape
    padded = jnp.pad(x[..., 0], ((0, 0), (1, 1), (1, 1)))
    patches = jnp.stack(
        [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    )
    product = jnp.einsum("pn,pc->nc", patches.reshape(9, -1), layer.kernel[...].reshape(9, -1))
    return product.reshape(batch, height, width, -1)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling; an odd last row or column is ignored.

    Equal maxima share the gradient. The gradient is written out because on CPU that of
    reduce_window takes several times as long.
    """
    return nnx.max_pool(x, (2, 2), (2, 2))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    x, y = saved
    batch, height, width, channels = y.shape
    blocks = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
    spread = lambda a: a[:, :, None, :, None]
    largest = blocks == spread(y)
    # A sum of four slices, because on CPU a reduction over both axes is slower.
    count = sum(largest[:, :, i, :, j].astype(g.dtype) for i in range(2) for j in range(2))
    dx = jnp.where(largest, spread(g / count), 0).reshape(batch, 2 * height, 2 * width, channels)
    border = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    return (jnp.pad(dx, border),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        convolution = lambda m, n, size, stride: nnx.Conv(
            m, n, (size, size), strides=stride, use_bias=False, kernel_init=_he, rngs=rngs
        )
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3, 1)
        self.norms = nnx.List(batch_norm(outputs, rngs) for _ in range(2))
        change = stride != 1 or inputs != outputs
        self.shortcut = convolution(inputs, outputs, 1, stride) if change else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A ResNet for small images: a 3x3 stem, stages of halving size, global average pooling."""

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int], blocks: int, outputs: int,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.stem = nnx.Conv(
            shape[-1], channels[0], (3, 3), use_bias=False, kernel_init=_he, rngs=rngs
        )
        self.norm = batch_norm(channels[0], rngs)
        self.blocks = nnx.List()
        for stage, (m, n) in enumerate(pairwise([channels[0], *channels])):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                self.blocks.append(ResidualBlock(n if block else m, n, stride, rngs=rngs))
        self.logits = nnx.Linear(channels[-1], outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean(axis=(1, 2)))


BATCH_NORM_MOMENTUM = 0.9


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=BATCH_NORM_MOMENTUM, rngs=rngs)


class Generator(nnx.Module):
    """DCGAN's generator, for images with sides divisible by 4 (Radford et al. 2015)."""

    def __init__(self, latent: int, width: int, shape: Sequence[int], *, rngs: nnx.Rngs):
        self.start = (shape[0] // 4, shape[1] // 4, 2 * width)
        flat = self.start[0] * self.start[1] * self.start[2]
        self.dense = nnx.Linear(latent, flat, rngs=rngs)
        self.up = nnx.List(
            nnx.ConvTranspose(m, n, (4, 4), strides=(2, 2), padding="SAME", rngs=rngs)
            for m, n in ((2 * width, width), (width, shape[-1]))
        )
        self.norms = nnx.List(batch_norm(n, rngs) for n in (2 * width, width))

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.dense(z).reshape(z.shape[0], *self.start)
        for norm, up in zip(self.norms, self.up, strict=True):
            x = up(nnx.relu(norm(x)))
        return jnp.tanh(x)


class Discriminator(nnx.Module):
    """DCGAN's discriminator: strided convolutions with leaky ReLU, one logit per image."""

    def __init__(self, width: int, shape: Sequence[int], *, rngs: nnx.Rngs):
        self.down = nnx.List(
            nnx.Conv(m, n, (4, 4), strides=2, padding="SAME", rngs=rngs)
            for m, n in ((shape[-1], width), (width, 2 * width))
        )
        self.logit = nnx.Linear((shape[0] // 4) * (shape[1] // 4) * 2 * width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for down in self.down:
            x = nnx.leaky_relu(down(x), 0.2)
        return self.logit(x.reshape(x.shape[0], -1))[:, 0]


def image_model(model: Any, shape: tuple[int, ...], outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """The model that ``config.model`` names, for inputs of ``shape``."""
    if model.name in ("mlp", "linear"):
        hidden = model.hidden_sizes if model.name == "mlp" else ()
        return MLP(math.prod(shape), hidden, outputs, rngs=rngs)
    if model.name not in ("cnn", "resnet"):
        known = "linear, mlp, cnn, resnet (images), gru, transformer (text), dcgan (adversarial)"
        raise UserError(f"config.model.name must be one of {known}, got {model.name!r}")
    if len(shape) != 3 or min(shape[:2]) < 4:
        raise UserError(f"{model.name} needs images of at least 4 x 4 pixels, got {shape}")
    if model.name == "cnn":
        return CNN(shape, model.channels, model.hidden, outputs, rngs=rngs)
    return ResNet(shape, model.channels, model.blocks, outputs, rngs=rngs)
