"""A character-level GRU on Python's documentation: clipped gradients, and a text drawn at the end.

    python -m examples.char_rnn [--text FILE]

Gradients are clipped before they reach NAG, so that a large one does not stay in the momentum. The
model is split into its definition and its parameters, so a whole epoch is one compiled program.
"""

import functools
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nag_jax

BATCH_SIZE, LENGTH, HIDDEN = 32, 64, 192  # windows of LENGTH characters
Carry = tuple[optax.Params, optax.OptState]  # params and the optimizer's state


class GRU(nnx.Module):
    """Codes ``[batch, time]`` and a state ``[batch, HIDDEN]`` to logits, time first, and state."""

    def __init__(self, symbols: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(symbols, 64, rngs=rngs)
        self.cell = nnx.GRUCell(64, HIDDEN, rngs=rngs)
        self.logits = nnx.Linear(HIDDEN, symbols, rngs=rngs)

    def __call__(self, codes: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, hidden = jax.lax.scan(self.cell, state, self.embed(codes.T))
        return self.logits(hidden), state


@functools.partial(jax.jit, static_argnums=0)
def loss_fn(graphdef: nnx.GraphDef, params: optax.Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next character; windows int32 ``[batch, LENGTH + 1]``."""
    start = jnp.zeros((len(windows), HIDDEN))
    logits, _ = nnx.merge(graphdef, params)(windows[:, :-1], start)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T).mean()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_epoch(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, carry: Carry, batches: jax.Array
) -> Carry:
    def step(carry: Carry, windows: jax.Array) -> tuple[Carry, None]:
        params, opt_state = carry
        gradients = jax.grad(loss_fn, argnums=1)(graphdef, params, windows)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, carry, batches)[0]


@functools.partial(jax.jit, static_argnums=0)
def sample(graphdef: nnx.GraphDef, params: optax.Params, keys: jax.Array) -> jax.Array:
    """Draws one code per key, each from the model's distribution given all before it."""
    model = nnx.merge(graphdef, params)

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array):
        code, state = carry
        logits, state = model(code[None, None], state)
        code = jax.random.categorical(key, logits[0, 0])
        return (code, state), code

    return jax.lax.scan(step, (jnp.zeros([], int), jnp.zeros((1, HIDDEN))), keys)[1]


def main(argv: list[str] | None = None) -> float:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's documentation")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    try:
        text = options.text.read_text("utf-8") if options.text else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text: {error}")
    if len(text) < 2 * BATCH_SIZE * (LENGTH + 1):
        parser.error(f"--text must hold at least {2 * BATCH_SIZE * (LENGTH + 1)} characters")

    symbols, codes = np.unique(list(text), return_inverse=True)
    windows = jnp.asarray(codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)])
    windows = windows.reshape(-1, LENGTH + 1)
    steps = 9 * len(windows) // 10 // BATCH_SIZE  # in an epoch; the rest of the text is for tests
    train, test = jnp.split(windows, [steps * BATCH_SIZE])

    rngs = nnx.Rngs(options.seed)
    graphdef, params = nnx.split(GRU(len(symbols), rngs=rngs), nnx.Param)
    schedule = optax.cosine_decay_schedule(1.0, options.epochs * steps)
    nag = nag_jax.nag(schedule, momentum=0.9, convention="sutskever")
    tx = optax.chain(optax.clip_by_global_norm(1.0), nag)
    carry, loss = (params, tx.init(params)), math.inf
    for epoch in range(1, options.epochs + 1):
        order = jax.random.permutation(rngs(), len(train)).reshape(steps, BATCH_SIZE)
        carry = train_epoch(graphdef, tx, carry, train[order])
        loss = float(loss_fn(graphdef, nag_jax.eval_params(*carry), test))
        print(f"epoch {epoch:2}: test loss {loss:.4f}, perplexity {math.exp(loss):.2f}")

    drawn = sample(graphdef, nag_jax.eval_params(*carry), jax.random.split(rngs(), 400))
    print("\n" + "".join(symbols[np.asarray(drawn)]))
    return loss


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
