"""Regression on scikit-learn's diabetes data with `nag_auto`, which needs no learning rate.

    python -m examples.regression

The loss is multiplied by 0.001, by 1 and by 1000. A learning rate tuned for one of the three would
be wrong for the others by factors of a thousand; `nag_auto` finds the right one for each.
"""

import functools
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

import nag_jax

BATCH_SIZE, WEIGHT_DECAY = 32, 0.1


class MLP(nnx.Module):
    """One hidden layer: ``[batch, inputs]`` to predictions ``[batch]``."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(inputs, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(nnx.tanh(self.hidden(x)))[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    graphdef: nnx.GraphDef,
    steps: int,
    params: optax.Params,
    scale: float,
    data: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> tuple[optax.Params, jax.Array]:
    """The iterate to evaluate after all steps, and the learning rate that was found."""
    x, y = data
    tx = nag_jax.nag_auto(momentum=0.9)

    def loss_fn(params: optax.Params, rows: jax.Array) -> jax.Array:
        errors = nnx.merge(graphdef, params)(x[rows]) - y[rows]
        penalty = WEIGHT_DECAY / 2 * optax.tree.norm(params, squared=True)
        return scale * (jnp.mean(errors**2) + penalty)

    def step(carry: tuple[optax.Params, optax.OptState], key: jax.Array):
        params, opt_state = carry
        rows = jax.random.choice(key, len(y), (BATCH_SIZE,), replace=False)
        gradients = jax.grad(loss_fn)(params, rows)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, steps)
    (params, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    # By default nag_auto evaluates an average of the parameters, so nothing needs to decay.
    return nag_jax.eval_params(params, opt_state), optax.tree.get(opt_state, "learning_rate")


def main(argv: list[str] | None = None) -> list[float]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")

    x, y = load_diabetes(return_X_y=True)  # each column of x has mean 0 and norm 1
    train_x, test_x, train_y, test_y = map(
        np.asarray, train_test_split(x * len(x) ** 0.5, y, test_size=110, random_state=0)
    )
    linear = LinearRegression().fit(train_x, train_y).score(test_x, test_y)
    print(f"linear regression: R2 {linear:.3f}")
    mean, std = train_y.mean(), train_y.std()
    data = jnp.asarray(train_x), jnp.asarray((train_y - mean) / std)

    rngs = nnx.Rngs(options.seed)
    graphdef, start = nnx.split(MLP(inputs=10, hidden=32, rngs=rngs), nnx.Param)
    key, results = rngs(), []
    for scale in (0.001, 1.0, 1000.0):
        params, rate = train(graphdef, options.steps, start, scale, data, key)
        predictions = mean + std * nnx.merge(graphdef, params)(jnp.asarray(test_x))
        results.append(float(r2_score(test_y, predictions)))
        print(f"MLP, loss times {scale:g}: R2 {results[-1]:.3f}, learning rate found {rate:.1e}")
    return results


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
