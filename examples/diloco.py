"""DiLoCo: four workers that average their parameters every H steps, against synchronous NAG.

    python -m examples.diloco

Each worker trains on its own quarter of the digits. Here the workers are rows of arrays on one
device, by `jax.vmap`. With a device for each, `jax.shard_map` or `jax.pmap` takes its place and the
update stays as it is.
"""

import functools
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nag_jax

WORKERS, BATCH_SIZE = 4, 16  # the batch of each worker
Params = dict[str, jax.Array]


class Row(NamedTuple):
    every: int  # H; 0: synchronous
    bytes_per_step: float  # that each worker puts into averages
    loss: float  # on the test set, like the accuracy
    accuracy: float


def init_params(key: jax.Array) -> Params:
    """A network with one hidden layer, for images of 8x8 pixels and ten digits."""
    keys = jax.random.split(key)
    return {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "logits": jax.random.normal(keys[1], (128, 10)) / 12,
    }


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy, and the accuracy."""
    logits = jax.nn.relu(images @ params["hidden"]) @ params["logits"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(axis=-1) == labels).mean()


def train(every: int, steps: int, key: jax.Array, images: jax.Array, labels: jax.Array) -> Params:
    """Averages parameters after every ``every`` steps or, with 0, gradients in each step.

    The images are float ``[WORKERS, n, 64]`` and the labels int ``[WORKERS, n]``.
    """
    tx = nag_jax.nag(0.1, momentum=0.9)
    if every:
        tx = nag_jax.diloco(tx, "workers", learning_rate=0.7, momentum=0.5, every=every)

    def update(params, opt_state, images, labels, key, *, sync):
        rows = jax.random.choice(key, len(labels), (BATCH_SIZE,), replace=False)
        gradients, _ = jax.grad(loss_fn, has_aux=True)(params, images[rows], labels[rows])
        if not every:
            gradients = jax.lax.pmean(gradients, "workers")
        # `sync` is known when the step is compiled: without it workers exchange nothing at all.
        updates, opt_state = tx.update(gradients, opt_state, params, sync=sync)
        return optax.apply_updates(params, updates), opt_state

    @functools.partial(jax.jit, static_argnames="sync", donate_argnums=(0, 1))
    def step(params, opt_state, keys, sync):
        workers = jax.vmap(functools.partial(update, sync=sync), axis_name="workers")
        return workers(params, opt_state, images, labels, keys)

    init_key, key = jax.random.split(key)
    params = jax.tree.map(lambda x: jnp.stack([x] * WORKERS), init_params(init_key))
    opt_state = jax.vmap(tx.init)(params)
    for i, keys in enumerate(jax.random.split(key, (steps, WORKERS)), 1):
        params, opt_state = step(params, opt_state, keys, sync=every > 0 and i % every == 0)
    # The outer iterate, which is the same on all workers.
    return jax.tree.map(lambda x: x[0], jax.vmap(nag_jax.eval_params)(params, opt_state))


def main(argv: list[str] | None = None) -> list[Row]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=512, help="number of updates")
    parser.add_argument("--every", type=int, nargs="+", default=[8, 32, 128], help="H, one or more")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data")
    options = parser.parse_args(argv)
    if options.steps < 1 or any(every < 1 or options.steps % every for every in options.every):
        parser.error("--steps must be at least 1, and each --every must divide it")

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = map(
        jnp.asarray,
        train_test_split(images / 16, labels, test_size=361, stratify=labels, random_state=0),
    )
    data = train_x.reshape(WORKERS, -1, 64), train_y.reshape(WORKERS, -1)
    rows = []
    for every in (0, *options.every):
        params = train(every, options.steps, jax.random.key(options.seed), *data)
        loss, accuracy = map(float, loss_fn(params, test_x, test_y))
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        rows.append(Row(every, size / max(every, 1), loss, accuracy))
        name = f"every {every} steps" if every else "synchronous"
        print(
            f"{name:16} {rows[-1].bytes_per_step:8,.0f} bytes per step, "
            f"test loss {loss:.4f}, test accuracy {accuracy:.2%}"
        )
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
