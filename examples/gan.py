"""A GAN that draws the clothes of Fashion-MNIST: two networks, each with its own NAG optimizer.

    python -m examples.gan

After each epoch the evaluated iterate of the generator draws images into --out. The data are in the
Debian package dataset-fashion-mnist, or the .gz files of github.com/zalandoresearch/fashion-mnist.
"""

import gzip
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from flax import nnx

import nag_jax

BATCH_SIZE, LATENT, PIXELS = 128, 64, 28 * 28
FOLDER = Path("/usr/share/datasets/fashion-mnist")
Networks = tuple[nnx.Sequential, nnx.Sequential]  # generator and discriminator
Optimizers = tuple[nnx.Optimizer, nnx.Optimizer]


def make_generator(rngs: nnx.Rngs) -> nnx.Sequential:
    """Noise ``[batch, LATENT]`` to images ``[batch, PIXELS]`` in (-1, 1)."""
    return nnx.Sequential(
        nnx.Linear(LATENT, 256, rngs=rngs),
        nnx.LayerNorm(256, rngs=rngs),
        nnx.relu,
        nnx.Linear(256, 512, rngs=rngs),
        nnx.LayerNorm(512, rngs=rngs),
        nnx.relu,
        nnx.Linear(512, PIXELS, rngs=rngs),
        nnx.tanh,
    )


def make_discriminator(rngs: nnx.Rngs) -> nnx.Sequential:
    """Images ``[batch, PIXELS]`` to logits ``[batch, 1]``, which are positive for "real"."""
    return nnx.Sequential(
        nnx.Linear(PIXELS, 256, rngs=rngs),
        nnx.leaky_relu,
        nnx.Linear(256, 128, rngs=rngs),
        nnx.leaky_relu,
        nnx.Linear(128, 1, rngs=rngs),
    )


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    networks: Networks, optimizers: Optimizers, images: jax.Array, key: jax.Array
) -> jax.Array:
    generator, discriminator = networks
    real, noise = images / 127.5 - 1, jax.random.normal(key, (len(images), LATENT))

    def generator_loss(generator: nnx.Sequential) -> jax.Array:
        return nnx.softplus(-discriminator(generator(noise))).mean()

    def discriminator_loss(discriminator: nnx.Sequential) -> jax.Array:
        of_real, of_drawn = discriminator(real), discriminator(generator(noise))
        return (nnx.softplus(-of_real) + nnx.softplus(of_drawn)).mean()  # two cross-entropies

    # Both gradients are taken before either network moves.
    g_loss, g_gradients = nnx.value_and_grad(generator_loss)(generator)
    d_loss, d_gradients = nnx.value_and_grad(discriminator_loss)(discriminator)
    optimizers[0].update(generator, g_gradients)
    optimizers[1].update(discriminator, d_gradients)
    return jnp.stack((g_loss, d_loss))


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the .gz files")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--out", type=Path, default=Path("runs/gan.png"), help="drawn images")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    path = options.data / "train-images-idx3-ubyte.gz"
    if not path.exists():
        parser.error(f"{path} is missing; 'apt install dataset-fashion-mnist' or see -h")
    pixels = gzip.decompress(path.read_bytes())
    images = jnp.frombuffer(pixels, jnp.uint8, offset=16).reshape(-1, PIXELS)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    rngs = nnx.Rngs(options.seed)
    networks = make_generator(rngs), make_discriminator(rngs)
    # Less momentum than usual: the loss of each network changes as the other one learns.
    optimizers = (
        nnx.Optimizer(networks[0], nag_jax.nag(0.05, momentum=0.5), wrt=nnx.Param),
        nnx.Optimizer(networks[1], nag_jax.nag(0.02, momentum=0.5), wrt=nnx.Param),
    )
    noise, steps = jax.random.normal(rngs(), (64, LATENT)), len(images) // BATCH_SIZE
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(rngs(), len(images))
        batches = order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
        losses = [train_step(networks, optimizers, images[rows], rngs()) for rows in batches]
        g_loss, d_loss = jnp.stack(losses).mean(axis=0)
        print(f"epoch {epoch:2}: generator loss {g_loss:.3f}, discriminator loss {d_loss:.3f}")
        # The generator holds the look-ahead point. Its evaluated iterate draws, in a copy.
        graphdef, params = nnx.split(networks[0], nnx.Param)
        evaluated = nnx.merge(graphdef, nag_jax.eval_params(params, optimizers[0].opt_state))
        drawn = np.asarray(evaluated(noise)).reshape(8, 8, 28, 28).swapaxes(1, 2)
        matplotlib.image.imsave(options.out, drawn.reshape(8 * 28, 8 * 28), cmap="gray")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
