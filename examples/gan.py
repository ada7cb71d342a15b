"""A GAN that draws Fashion-MNIST's clothes: one NAG optimizer for each of the two networks.

    python -m examples.gan

Each network has its own parameters, optimizer and evaluated iterate. The images are drawn by the
generator's. The data are in the Debian package dataset-fashion-mnist, or in the four .gz files of
github.com/zalandoresearch/fashion-mnist.
"""

import argparse
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from flax import nnx

import nag_jax

BATCH_SIZE, LATENT, SIDE = 128, 64, 8  # SIDE: of the grid of images


def upsample(x: jax.Array) -> jax.Array:
    """Each pixel twice in both directions: less checkered than a transposed convolution."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Generator(nnx.Module):
    """Noise ``[batch, LATENT]`` to images ``[batch, 28, 28, 1]`` in (-1, 1)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(LATENT, 7 * 7 * 32, rngs=rngs)
        self.first_norm = nnx.BatchNorm(32, rngs=rngs)
        self.first = nnx.Conv(32, 16, (3, 3), rngs=rngs)
        self.second_norm = nnx.BatchNorm(16, rngs=rngs)
        self.second = nnx.Conv(16, 1, (3, 3), rngs=rngs)

    def __call__(self, noise: jax.Array) -> jax.Array:
        x = self.dense(noise).reshape(-1, 7, 7, 32)
        x = self.first(upsample(nnx.relu(self.first_norm(x))))
        return jnp.tanh(self.second(upsample(nnx.relu(self.second_norm(x)))))


class Discriminator(nnx.Module):
    """Images to logits ``[batch]``, positive for those that it takes for real."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (4, 4), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 32, (4, 4), strides=2, rngs=rngs)
        self.logit = nnx.Linear(7 * 7 * 32, 1, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.leaky_relu(self.first(images), 0.2)
        x = nnx.leaky_relu(self.second(x), 0.2)
        return self.logit(x.reshape(len(x), -1))[:, 0]


@nnx.jit(donate_argnums=(0, 1, 2, 3))
def train_step(
    generator: Generator,
    discriminator: Discriminator,
    generator_optimizer: nnx.Optimizer,
    discriminator_optimizer: nnx.Optimizer,
    images: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    real = images / 127.5 - 1
    noise = jax.random.normal(key, (len(images), LATENT))
    fake = generator(noise)

    def discriminator_loss(discriminator: Discriminator) -> jax.Array:
        # softplus(-logit) is the cross-entropy of "real", softplus(logit) that of "generated".
        return jnp.mean(nnx.softplus(-discriminator(real)) + nnx.softplus(discriminator(fake)))

    def generator_loss(generator: Generator) -> jax.Array:
        return jnp.mean(nnx.softplus(-discriminator(generator(noise))))

    # Both gradients are taken before either network moves.
    d_loss, d_gradients = nnx.value_and_grad(discriminator_loss)(discriminator)
    g_loss, g_gradients = nnx.value_and_grad(generator_loss)(generator)
    discriminator_optimizer.update(discriminator, d_gradients)
    generator_optimizer.update(generator, g_gradients)
    return g_loss, d_loss


@nnx.jit
def draw(generator: Generator, optimizer: nnx.Optimizer, noise: jax.Array) -> jax.Array:
    """A grid of images in [0, 1], drawn by the evaluated iterate of the generator."""
    graphdef, params, rest = nnx.split(generator, nnx.Param, ...)
    evaluated = nnx.merge(graphdef, nag_jax.eval_params(params, optimizer.opt_state), rest)
    images = evaluated(noise).reshape(SIDE, SIDE, 28, 28)
    return (images.swapaxes(1, 2).reshape(SIDE * 28, SIDE * 28) + 1) / 2


def main(argv: list[str] | None = None) -> np.ndarray:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--dlr", type=float, default=0.02)
    parser.add_argument("--m", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gan"), help="folder of images")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    path = options.data / "train-images-idx3-ubyte.gz"
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        parser.error(f"{path} is missing; 'apt install dataset-fashion-mnist' or see -h")
    images = jnp.frombuffer(content, jnp.uint8, offset=16).reshape(-1, 28, 28, 1)
    options.out.mkdir(parents=True, exist_ok=True)

    rngs = nnx.Rngs(options.seed)
    generator, discriminator = Generator(rngs=rngs), Discriminator(rngs=rngs)
    generator_optimizer, discriminator_optimizer = (
        nnx.Optimizer(network, nag_jax.nag(lr, options.m), wrt=nnx.Param)
        for network, lr in ((generator, options.lr), (discriminator, options.dlr))
    )
    noise = jax.random.normal(rngs(), (SIDE**2, LATENT))
    steps = len(images) // BATCH_SIZE
    grid = jnp.zeros(())
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(rngs(), len(images))[: steps * BATCH_SIZE]
        for rows in order.reshape(steps, BATCH_SIZE):
            g, d = train_step(
                generator,
                discriminator,
                generator_optimizer,
                discriminator_optimizer,
                images[rows],
                rngs(),
            )
        path = options.out / f"epoch-{epoch:02}.png"
        grid = draw(generator, generator_optimizer, noise)
        matplotlib.image.imsave(path, np.asarray(grid), cmap="gray", vmin=0, vmax=1)
        print(f"epoch {epoch}: {g:.3f} {d:.3f} images in {path}", flush=True)
    return np.asarray(grid)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
