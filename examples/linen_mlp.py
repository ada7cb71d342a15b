"""The MLP of `mlp.py` in flax.linen, with a TrainState.

    python -m examples.linen_mlp

nag_jax works on any tree of parameters. Only two lines change: TrainState takes the optimizer, and
the iterate to evaluate is made from `state.params` and `state.opt_state`.
"""

import functools
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nag_jax

BATCH_SIZE = 32


class MLP(nn.Module):
    """Two hidden layers with ReLU: ``[batch, inputs]`` to logits ``[batch, outputs]``."""

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.outputs)(x)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


@jax.jit
def evaluate(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # `state.params` is the look-ahead point, where gradients are taken. Evaluate the iterate behind
    # it, but keep the state: training continues from there.
    params = nag_jax.eval_params(state.params, state.opt_state)
    logits = state.apply_fn({"params": params}, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(axis=-1) == labels).mean()


def main(argv: list[str] | None = None) -> float:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of the first step")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
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
    init_key, order_key = jax.random.split(jax.random.key(options.seed))
    model = MLP(hidden=128, outputs=10)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(init_key, train_x[:1])["params"],
        tx=nag_jax.nag(schedule, momentum=0.9, convention="sutskever", weight_decay=1e-3),
    )

    accuracy = 0.0
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(train_x))
        for rows in order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE):
            state = train_step(state, train_x[rows], train_y[rows])
        # The host waits for the device once an epoch. To wait in every step would slow it down.
        loss, accuracy = jax.device_get(evaluate(state, test_x, test_y))
        print(f"epoch {epoch:2}: test loss {loss:.4f}, test accuracy {accuracy:.2%}")
    return float(accuracy)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
