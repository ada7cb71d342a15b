"""Piecewise constant solutions along one axis, with their derivatives.

Both functions return segments of equal numbers. While the segments stay the same, each is the mean
of its data plus what the penalty adds at its ends, which gives the derivative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.custom_jvp
def decreasing(y: jax.Array) -> jax.Array:
    """The nearest vector to ``y`` that does not increase, by pooling adjacent violators."""
    n = y.shape[0]
    means, sizes = jnp.zeros_like(y), jnp.zeros(n, jnp.int32)

    def unfinished(loop: tuple[jax.Array, ...]) -> jax.Array:
        _, _, top, i = loop
        return (i < n) | _violates(loop[0], top)

    def body(loop: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        means, sizes, top, i = loop
        pool = _violates(means, top)
        # Either the last two blocks become one, or the next entry becomes a block.
        a, b, m, k = means[top - 2], means[top - 1], sizes[top - 2], sizes[top - 1]
        joined = a + (b - a) * k.astype(y.dtype) / jnp.maximum(m + k, 1).astype(y.dtype)
        at = jnp.where(pool, top - 2, top)
        means = means.at[at].set(jnp.where(pool, joined, y[jnp.minimum(i, n - 1)]))
        sizes = sizes.at[at].set(jnp.where(pool, m + k, 1))
        return means, sizes, at + 1, jnp.where(pool, i, i + 1)

    zero = jnp.zeros([], jnp.int32)
    means, sizes, top, _ = jax.lax.while_loop(unfinished, body, (means, sizes, zero, zero))
    sizes = jnp.where(jnp.arange(n) < top, sizes, 0)
    return jnp.repeat(means, sizes, total_repeat_length=n)


def _violates(means: jax.Array, top: jax.Array) -> jax.Array:
    """Whether the last block is above the one before it."""
    return (top >= 2) & (means[top - 1] > means[top - 2])


@decreasing.defjvp
def _decreasing_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x = decreasing(*primals)
    return x, _means(x, tangents[0])


class _String(NamedTuple):
    """The state of the taut string; names as in the paper, k0, km and kp as first, low and high."""

    values: jax.Array  # of each segment, at the index of its first entry
    starts: jax.Array  # whether a segment starts here
    k: jax.Array
    first: jax.Array
    low: jax.Array  # the last k where the string touched the lower boundary
    high: jax.Array
    vmin: jax.Array
    vmax: jax.Array
    umin: jax.Array
    umax: jax.Array
    done: jax.Array


@jax.custom_jvp
def taut_string(y: jax.Array, by: jax.Array) -> jax.Array:
    """The minimizer of ``|x - y|^2/2 + by*(sum of |x_{i+1} - x_i|)``."""
    n = y.shape[0]
    at = lambda i: y[jnp.minimum(i, n - 1)]

    def body(s: _String) -> _String:
        last = s.k >= n - 1
        following = at(s.k + 1)
        down = jnp.where(last, s.umin < 0, following + s.umin < s.vmin - by)
        up = ~down & jnp.where(last, s.umax > 0, following + s.umax > s.vmax + by)
        jump = down | up
        end = last & ~jump
        length = (s.k - s.first + 1).astype(y.dtype)

        # A segment ends where the string last touched the boundary that it now crosses.
        value = jnp.where(down, s.vmin, jnp.where(up, s.vmax, s.vmin + s.umin / length))
        closes = jump | end
        values = s.values.at[s.first].set(jnp.where(closes, value, s.values[s.first]))
        starts = s.starts.at[s.first].set(closes | s.starts[s.first])
        new = jnp.where(down, s.low, s.high) + 1
        fresh = at(new)
        begun = _String(
            values, starts, new, new, new, new,
            vmin=jnp.where(down, fresh, jnp.where(last, s.vmin, fresh - 2 * by)),
            vmax=jnp.where(up, fresh, jnp.where(last, s.vmax, fresh + 2 * by)),
            umin=jnp.where(last & up, fresh - by - s.vmin, by),
            umax=jnp.where(last & down, fresh + by - s.vmax, -by),
            done=s.done,
        )  # fmt: skip

        # Otherwise it goes one entry further; a boundary that it touches moves.
        length = length + 1
        umin, umax = s.umin + following - s.vmin, s.umax + following - s.vmax
        touches_low, touches_high = umin >= by, umax <= -by
        further = s._replace(
            values=values,
            starts=starts,
            k=jnp.minimum(s.k + 1, n - 1),
            low=jnp.where(touches_low, s.k + 1, s.low),
            high=jnp.where(touches_high, s.k + 1, s.high),
            vmin=jnp.where(touches_low, s.vmin + (umin - by) / length, s.vmin),
            vmax=jnp.where(touches_high, s.vmax + (umax + by) / length, s.vmax),
            umin=jnp.where(touches_low, by, umin),
            umax=jnp.where(touches_high, -by, umax),
        )
        after = jax.tree.map(lambda a, b: jnp.where(jump, a, b), begun, further)
        return after._replace(done=end)

    zero = jnp.zeros([], jnp.int32)
    start = _String(
        jnp.zeros_like(y), jnp.zeros(n, bool), zero, zero, zero, zero,
        y[0] - by, y[0] + by, by, -by, jnp.asarray(False),
    )  # fmt: skip
    s = jax.lax.while_loop(lambda s: ~s.done, body, start)
    return s.values[_first_of_segment(s.starts)]


@taut_string.defjvp
def _taut_string_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x = taut_string(*primals)
    # Where it jumps, both sides are pulled towards each other.
    jumps = jnp.sign(jnp.diff(x))
    zero = jnp.zeros(1, x.dtype)
    pull = jnp.concatenate([jumps, zero]) - jnp.concatenate([zero, jumps])
    return x, _means(x, tangents[0] + tangents[1] * pull)


def _first_of_segment(starts: jax.Array) -> jax.Array:
    """The index of the first entry of the segment of each entry."""
    return jax.lax.cummax(jnp.where(starts, jnp.arange(starts.shape[0]), 0))


def _means(x: jax.Array, y: jax.Array) -> jax.Array:
    """The means of ``y`` over the segments in which ``x`` is constant."""
    n = x.shape[0]
    starts = jnp.concatenate([jnp.ones(1, bool), jnp.diff(x) != 0])
    segment = jnp.cumsum(starts) - 1
    total = jax.ops.segment_sum(y, segment, n)
    size = jax.ops.segment_sum(jnp.ones_like(y), segment, n)
    return (total / jnp.maximum(size, 1))[segment]
