"""An MLP on handwritten digits, trained with Nesterov's accelerated gradient.

    python -m examples.mlp

The digits come with scikit-learn, so nothing is downloaded. Two lines are specific to nag_jax: the
one that makes the optimizer and the one that asks for the iterate to evaluate.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nag_jax

BATCH_SIZE = 32


class MLP(nnx.Module):
    """Two hidden layers with ReLU: ``[batch, inputs]`` to logits ``[batch, outputs]``."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss_fn(model: MLP, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy, and the accuracy."""
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(axis=-1) == labels).mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    gradients, _ = nnx.grad(loss_fn, has_aux=True)(model, images, labels)
    optimizer.update(model, gradients)


@nnx.jit
def evaluate(
    model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The model holds the look-ahead point, where gradients are taken. Evaluate the iterate behind
    # it, in a copy: training continues from the look-ahead point.
    graphdef, params = nnx.split(model, nnx.Param)
    params = nag_jax.eval_params(params, optimizer.opt_state)
    return loss_fn(nnx.merge(graphdef, params), images, labels)


def save_curves(path: Path, history: np.ndarray) -> None:
    """Plots ``history``, float ``[epochs, 2, 2]``: loss and accuracy of training and test data."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 2)):
        axes.plot(np.arange(1, len(history) + 1), history[..., i], label=["training", "test"])
        axes.set(xlabel="epoch", ylabel=("loss", "accuracy")[i])
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> float:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of the first step")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--out", type=Path, default=Path("runs/mlp.png"), help="plot of the curves")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = map(
        jnp.asarray,
        train_test_split(images / 16, labels, test_size=360, stratify=labels, random_state=0),
    )
    steps = len(train_x) // BATCH_SIZE  # in an epoch
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.epochs * steps)
    rngs = nnx.Rngs(options.seed)
    model = MLP(64, 128, 10, rngs=rngs)
    tx = nag_jax.nag(schedule, momentum=0.9, convention="sutskever", weight_decay=1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    history = []
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(rngs(), len(train_x))
        for rows in order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE):
            train_step(model, optimizer, train_x[rows], train_y[rows])
        training = evaluate(model, optimizer, train_x, train_y)
        test = evaluate(model, optimizer, test_x, test_y)
        # The host waits for the device once an epoch. To wait in every step would slow it down.
        history.append(jax.device_get((training, test)))
        (train_loss, _), (_, accuracy) = history[-1]
        print(f"epoch {epoch:2}: training loss {train_loss:.4f}, test accuracy {accuracy:.2%}")
    save_curves(options.out, np.array(history))
    print(f"curves in {options.out}")
    return float(history[-1][1][1])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
