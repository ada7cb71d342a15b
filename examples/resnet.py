"""A ResNet on Fashion-MNIST: BatchNorm and the iterate to evaluate.

    python -m examples.resnet

The running statistics of BatchNorm describe the look-ahead points that training goes through. The
iterate to evaluate is another point and gets its own. The data are in the Debian package
dataset-fashion-mnist, or in the four .gz files of github.com/zalandoresearch/fashion-mnist.
"""

import gzip
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nag_jax

BATCH_SIZE = 128
FOLDER = Path("/usr/share/datasets/fashion-mnist")
Data = tuple[jax.Array, jax.Array]  # images, uint8 [n, 28, 28, 1], and labels, uint8 [n]


class Block(nnx.Module):
    """Two convolutions with BatchNorm and a shortcut around them; it halves the image."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(inputs, outputs, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.second = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, outputs, (1, 1), strides=2, rngs=rngs)
        self.first_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.second_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.first_norm(self.first(x)))
        return nnx.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    """Three blocks, an average over the image and a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        sizes = ((1, 16), (16, 32), (32, 64))
        self.blocks = nnx.Sequential(*(Block(m, n, rngs=rngs) for m, n in sizes))
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits(self.blocks(x).mean(axis=(1, 2)))


def load(folder: Path, split: str) -> Data:
    """The images and labels of "train" or "t10k"."""
    read = lambda name: gzip.decompress((folder / f"{split}-{name}-ubyte.gz").read_bytes())
    images = jnp.frombuffer(read("images-idx3"), jnp.uint8, offset=16).reshape(-1, 28, 28, 1)
    return images, jnp.frombuffer(read("labels-idx1"), jnp.uint8, offset=8)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: ResNet, optimizer: nnx.Optimizer, batch: Data) -> None:
    def loss_fn(model: ResNet) -> jax.Array:
        images, labels = batch
        logits = model(images / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def forward(model: ResNet, images: jax.Array) -> jax.Array:
    """The logits. In training mode BatchNorm also updates its running statistics."""
    return model(images / 255)


def accuracy(model: ResNet, images: jax.Array, labels: jax.Array) -> float:
    model.eval()  # BatchNorm uses its running statistics
    parts = [forward(model, part).argmax(axis=-1) for part in jnp.array_split(images, 10)]
    return float((jnp.concatenate(parts) == labels).mean())


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the .gz files")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    try:
        (images, labels), test = load(options.data, "train"), load(options.data, "t10k")
    except (FileNotFoundError, NotADirectoryError) as error:
        parser.error(f"{error.filename} is missing; 'apt install dataset-fashion-mnist' or see -h")

    steps = len(images) // BATCH_SIZE  # in an epoch
    rngs = nnx.Rngs(options.seed)
    model = ResNet(rngs=rngs)
    tx = nag_jax.nag(optax.cosine_decay_schedule(0.1, options.epochs * steps), momentum=0.9)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(rngs(), len(images))
        batches = order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
        for rows in batches:
            train_step(model, optimizer, (images[rows], labels[rows]))
        evaluated = nnx.clone(model)
        nnx.update(evaluated, nag_jax.eval_params(nnx.state(model, nnx.Param), optimizer.opt_state))
        before = accuracy(evaluated, *test)
        evaluated.train()
        for rows in batches[:50]:  # at momentum 0.9, 0.5 % of the old statistics remains
            forward(evaluated, images[rows])
        after = accuracy(evaluated, *test)
        print(f"epoch {epoch}: test accuracy {after:.2%}, with the old statistics {before:.2%}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
