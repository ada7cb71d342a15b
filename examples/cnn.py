"""A CNN on Fashion-MNIST that resumes where it was interrupted, with the same numbers.

    python -m examples.cnn

For a model of your own, copy this file and change the class CNN. The data are in the Debian package
dataset-fashion-mnist, or in the four .gz files of github.com/zalandoresearch/fashion-mnist.
"""

import gzip
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import nag_jax

BATCH_SIZE = 128
FOLDER = Path("/usr/share/datasets/fashion-mnist")
Data = tuple[jax.Array, jax.Array]  # images, uint8 [n, 28, 28, 1], and labels, uint8 [n]


class CNN(nnx.Module):
    """Two strided convolutions, then two dense layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (5, 5), strides=2, rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
        self.logits = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.logits(nnx.relu(self.dense(x.reshape(len(x), -1))))


def load(folder: Path, split: str) -> Data:
    """The images and labels of "train" or "t10k"."""
    read = lambda name: gzip.decompress((folder / f"{split}-{name}-ubyte.gz").read_bytes())
    images = jnp.frombuffer(read("images-idx3"), jnp.uint8, offset=16).reshape(-1, 28, 28, 1)
    return images, jnp.frombuffer(read("labels-idx1"), jnp.uint8, offset=8)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: CNN, optimizer: nnx.Optimizer, batch: Data, key: jax.Array) -> jax.Array:
    images, labels = batch
    # Augmentation: half of the images are mirrored, with a key that follows from the step.
    mirror = jax.random.bernoulli(jax.random.fold_in(key, optimizer.step[...]), shape=labels.shape)
    images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)

    def loss_fn(model: CNN) -> jax.Array:
        logits = model(images / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def main(argv: list[str] | None = None) -> float:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the .gz files")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--out", type=Path, default=Path("runs/cnn"), help="folder of checkpoints")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    try:
        (images, labels), test = load(options.data, "train"), load(options.data, "t10k")
    except (FileNotFoundError, NotADirectoryError) as error:
        parser.error(f"{error.filename} is missing; 'apt install dataset-fashion-mnist' or see -h")

    rngs = nnx.Rngs(options.seed)
    model, order_key, key = CNN(rngs=rngs), rngs(), rngs()
    steps = len(images) // BATCH_SIZE  # in an epoch
    schedule = optax.cosine_decay_schedule(0.05, options.epochs * steps)
    weights = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # no decay of biases
    tx = nag_jax.nag(schedule, 0.9, weight_decay=5e-4, weight_decay_mask=weights)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(options.out.absolute(), item_handlers=handler) as manager:
        first = manager.latest_step() or 0
        if first:
            state = nnx.state((model, optimizer))
            shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
            if shapes(state) != shapes(manager.item_metadata(first)):
                parser.error(f"{options.out} is of another model or optimizer; change --out")
            restored = manager.restore(first, args=ocp.args.StandardRestore(state))
            nnx.update((model, optimizer), restored)
            print("finished" if first >= options.epochs else "resumed", f"after epoch {first}")
        for epoch in range(first, options.epochs):
            # The order follows from the epoch, so a resumed run sees what any other would have.
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(images))
            batches = order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
            losses = [
                train_step(model, optimizer, (images[rows], labels[rows]), key) for rows in batches
            ]
            # Save params and optimizer state, not the evaluated iterate: training needs these.
            manager.save(epoch + 1, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
            print(f"epoch {epoch + 1:2}: loss {jnp.stack(losses).mean():.4f}")

    # The model holds the look-ahead point, where gradients are taken. Evaluate the iterate behind.
    nnx.update(model, nag_jax.eval_params(nnx.state(model, nnx.Param), optimizer.opt_state))
    model.eval()  # for models with dropout or BatchNorm
    predict = nnx.jit(lambda model, images: model(images / 255).argmax(axis=-1))
    predictions = [predict(model, part) for part in jnp.array_split(test[0], 10)]
    accuracy = float((jnp.concatenate(predictions) == test[1]).mean())
    print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command resumes after the last epoch") from None
