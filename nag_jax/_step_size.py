"""Shared by automatic step sizes: a first guess, a search, and limits that prevent overflow."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._arithmetic import ratio, root
from nag_jax._types import PyTree

# The learning rate, its power of shrink, ok, decidable, up, down, and the number of trials.
_Carry: TypeAlias = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array
]

_SEARCHES = 100  # largest number of trials in one call


def guess(value: jax.Array, square: jax.Array) -> jax.Array:
    r""":math:`|f| / \|g\|^2`, in the units of a learning rate; 1 if that is 0 or not finite."""
    size = root(square)
    rate = ratio(ratio(jnp.abs(value), size), size)
    return jnp.where(jnp.isfinite(rate) & (rate > 0), within(rate), 1)


def within(lr: jax.Array) -> jax.Array:
    """``lr`` clipped to a range in which t^2 lr and 1/lr do not overflow."""
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
    """Searches for a learning rate start * shrink^k, k an integer, that is short enough.

    The result has the derivative of that expression for fixed k.

    Args:
      test: ``lr -> (ok, decidable)``: whether the step is short enough, and whether rounding leaves
        that decidable.
      start: the first learning rate to try.
      up: whether to look for the longest step, from a start that is short enough.
      blind: whether to also lengthen a step for which the test is not decidable.
      floor: the smallest learning rate to which a step that is too long is shortened.
      shrink: the factor between two trials, in (0, 1).

    Returns:
      The last learning rate tried, the two results of test for it, and the number of trials.
    """
    factor = jax.lax.stop_gradient(shrink)

    def body(carry: _Carry) -> _Carry:
        lr, power, _, _, up, _, n = carry
        again = (n > 0).astype(jnp.int32)
        power += jnp.where(up, -again, again)
        lr = jnp.where(n == 0, lr, within(jnp.where(up, lr / factor, lr * factor)))
        ok, decidable = test(lr)
        # Once a longer step has failed, the one before, which was short enough, ends the search.
        up, down = up & ok & (decidable | blind), ~ok & (lr * factor >= floor)
        return lr, power, ok, decidable, up, down, n + 1

    def unfinished(carry: _Carry) -> jax.Array:
        *_, up, down, n = carry
        return (n == 0) | ((up | down) & (n < _SEARCHES))

    no, zero = jnp.asarray(False), jnp.zeros([], jnp.int32)
    carry = (jax.lax.stop_gradient(start), zero, no, no, up, no, zero)
    # Outside of jit, a while_loop would be compiled again at each call.
    while not _traced(carry) and unfinished(carry):
        carry = body(carry)
    if _traced(carry):
        carry = jax.lax.while_loop(unfinished, body, carry)
    lr, power, ok, decidable, _, _, n = carry
    # A while_loop has no derivative in reverse mode. The two ratios are 1.
    lr *= _one(start) * _one(shrink) ** power.astype(start.dtype)
    return lr, ok, decidable, n


def _one(x: jax.Array) -> jax.Array:
    """1, with the derivative of log(x)."""
    return x / jax.lax.stop_gradient(x)


def _traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
