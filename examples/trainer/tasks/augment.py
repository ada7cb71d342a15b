"""Random changes of images on the device, each from one key; ``[batch, height, width, depth]``."""

import jax
import jax.numpy as jnp


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Moves each image by up to ``pixels`` in each direction and fills the border with zeros.

    This is the same as padding by ``pixels`` and cropping at random to the old size.
    """
    if not pixels:
        return images
    height, width = images.shape[1:3]
    border = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
    padded = jnp.pad(images, border)
    offsets = jax.random.randint(key, (2, len(images)), 0, 2 * pixels + 1)
    rows = offsets[0][:, None] + jnp.arange(height)[None]
    columns = offsets[1][:, None] + jnp.arange(width)[None]
    padded = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
    return jnp.take_along_axis(padded, columns[:, None, :, None], axis=2)


def random_zoom(key: jax.Array, images: jax.Array, fraction: float) -> jax.Array:
    """Crops each image at random to a side of at least ``1 - fraction`` and scales it back."""
    if not fraction:
        return images
    height, width = images.shape[1:3]
    size_key, position_key = jax.random.split(key)
    side = jax.random.uniform(size_key, (len(images), 1), minval=1 - fraction, maxval=1.0)
    position = jax.random.uniform(position_key, (len(images), 2))

    def crop(image: jax.Array, side: jax.Array, position: jax.Array) -> jax.Array:
        size = jnp.array([height, width])
        scale = jnp.full(2, 1.0) / side
        start = position * (1 - side) * size
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -start * scale, "linear", antialias=False
        )

    return jax.vmap(crop)(images.astype(jnp.float32), side, position)
