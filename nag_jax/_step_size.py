"""What the self-tuning step sizes share: a first guess, a search, limits that nothing overflows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._arithmetic import ratio, root

_SEARCHES = 100  # trial steps in one call at most


def guess(value: jax.Array, square: jax.Array) -> jax.Array:
    r""":math:`|f| / \|g\|^2`, which has the units of a learning rate; 1 if that says nothing."""
    size = root(square)
    rate = ratio(ratio(jnp.abs(value), size), size)
    return jnp.where(jnp.isfinite(rate) & (rate > 0), within(rate), 1)


def within(lr: jax.Array) -> jax.Array:
    """So far from overflow that t^2 lr and 1 / lr stay finite, whatever the loss."""
    largest = float(jnp.finfo(lr.dtype).max)
    return jnp.clip(lr, largest**-0.95, largest**0.75)


def search(
    test: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    *,
    up: jax.Array,
    blind: jax.Array,
    floor: jax.Array,
    shrink: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The learning rate tried last, what ``test`` says of it, and the number of trials.

    ``test(lr)`` says whether the step is short enough, and whether that can be told at all. Where
    ``up`` is set it looks for the longest one, and goes on where nothing can be told if ``blind``;
    steps that are too long become shorter as long as they stay above ``floor``.

    The result is start * shrink^power for a whole power, and has the derivative of that.
    """
    factor = jax.lax.stop_gradient(shrink)

    def body(carry: Any) -> Any:
        lr, power, _, _, up, _, n = carry
        again = (n > 0).astype(jnp.int32)
        power += jnp.where(up, -again, again)
        lr = jnp.where(n == 0, lr, within(jnp.where(up, lr / factor, lr * factor)))
        ok, telling = test(lr)
        # Once a longer step has failed, the last but one, which was short enough, ends it.
        up, down = up & ok & (telling | blind), ~ok & (lr * factor >= floor)
        return lr, power, ok, telling, up, down, n + 1

    def going(carry: Any) -> Any:
        *_, up, down, n = carry
        return (n == 0) | ((up | down) & (n < _SEARCHES))

    no, zero = jnp.asarray(False), jnp.zeros([], jnp.int32)
    carry = (jax.lax.stop_gradient(start), zero, no, no, up, no, zero)
    # Outside of jit a compiled loop would be compiled anew at each call.
    while not _traced(carry) and going(carry):
        carry = body(carry)
    if _traced(carry):
        carry = jax.lax.while_loop(going, body, carry)
    lr, power, ok, telling, _, _, n = carry
    # A while_loop has no derivative in reverse mode. The two ratios are 1.
    lr *= _one(start) * _one(shrink) ** power.astype(start.dtype)
    return lr, ok, telling, n


def _one(x: jax.Array) -> jax.Array:
    """1, with the derivative of log(x)."""
    return x / jax.lax.stop_gradient(x)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
