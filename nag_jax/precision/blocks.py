"""Blocks of a parameter that share one scale: their shape, and the int8 numbers inside them."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_TINY = 1e-37  # a block of a smaller scale is stored as 0: its reciprocal might overflow

_SLICES = 8


class BlockState(NamedTuple):
    """What ``int8_blocks`` adds to the state of ``accelerate``."""

    key: jax.Array  # of the noise of the next step, shape=(2,), uint32
    scales: Any  # like params: float32, one for each block; int8 zeros where m is not int8
    derivative: Any = ()  # like params, float32: zeros that carry the derivative of m, if kept


def block_shape(shape: tuple[int, ...], block_size: int, shards: int) -> tuple[int, ...]:
    """The lengths of a block along each axis, at most ``block_size`` elements in all.

    Last axes first, as long as they divide the axis. A block never crosses the boundary between
    two of gcd(axis, shards) equal shards along any axis.
    """
    block: list[int] = []
    room = block_size
    for length in reversed(shape):
        block.insert(0, _divisor(length // math.gcd(length, shards), room))
        room //= block[0]
    return tuple(block)


def _divisor(n: int, at_most: int) -> int:
    """A divisor of n of at most ``at_most``: the largest, or one that XLA handles well near it."""
    divisors = [d for d in range(1, max(min(n, at_most), 1) + 1) if n % d == 0]
    even = [d for d in divisors if d % _SLICES == 0 and 2 * d > divisors[-1]]
    return (even or divisors)[-1]


def zero_scales(m: jax.Array, block_size: int, shards: int) -> jax.Array:
    """The scales of a zero buffer, sharded as the buffer is."""
    block = block_shape(m.shape, block_size, shards)
    blocks = tuple(n // b for n, b in zip(m.shape, block, strict=True))
    mesh, spec = jax.typeof(m).sharding.mesh, explicit_spec(m)
    parts = [math.prod(mesh.shape[name] for name in jax.tree.leaves(axes)) for axes in spec]
    if any(n % devices for n, devices in zip(blocks, parts, strict=True)):
        raise ValueError(
            f"shards must be a multiple of the devices that a parameter is split over, {parts} "
            f"along the axes of shape {m.shape}, got {shards}; pass "
            f"int8_blocks(shards={math.lcm(shards, *parts)})"
        )
    return _largest(m, blocks)


@jax.jit  # as those below: traced once for leaves of one shape
def rescale(x: jax.Array, scales: jax.Array) -> jax.Array:
    """The scales that ``x`` needs; those of a leaf that is not int8 as they are."""
    return _largest(x, scales.shape) / 127 if scales.dtype == jnp.float32 else scales


@jax.jit
def encode(x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
    """``x`` in units of its scales, stochastically rounded to int8 by 16 random ``bits``."""
    inverse = jnp.where(scales > _TINY, 1 / scales, 0)
    noise = (bits.astype(jnp.float32) + 0.5) / 2**16
    q = jnp.floor(x.astype(jnp.float32) * _spread(inverse, x.shape) + noise)
    # NaN is in the scale. Without a choice here XLA on CPU would do all this again where the
    # update reads what was stored, and for that copy the old buffer first.
    return jnp.where(jnp.isnan(x), jnp.int8(0), jnp.clip(q, -127, 127).astype(jnp.int8))


@jax.jit
def decode(m: jax.Array, scales: jax.Array) -> jax.Array:
    """The float32 numbers that ``encode`` stored; ``m`` itself where it is not int8."""
    if m.dtype != jnp.int8:
        return m
    return m.astype(jnp.float32) * _spread(scales, m.shape)


@jax.custom_jvp
def zero_like(x: jax.Array) -> jax.Array:
    """Zeros with the derivative of ``x``, which JAX cannot attach to int8."""
    return jnp.zeros_like(x)


@zero_like.defjvp
def _zero_like_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x = primals[0]  # x - x, as JAX before 0.12 forgets a rule in forward over reverse mode
    return jnp.where(jnp.isfinite(x), x - jax.lax.stop_gradient(x), 0), tangents[0]


@jax.custom_jvp
def not_differentiable(x: jax.Array) -> jax.Array:
    """``x``; ValueError where its derivative is taken."""
    return x


@not_differentiable.defjvp
def _not_differentiable_jvp(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "an int8 buffer cannot keep the derivative of a step that was traced by jit or scan; pass "
        "accumulator_dtype=nag_jax.int8_blocks(differentiable=True), or stochastic_bfloat16()"
    )


def _largest(x: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """Largest magnitude in each block, float32; NaN where there is one."""
    # Order is that of the bits, also for NaN. XLA on CPU reduces integers several times faster,
    # and keeps what they are made of out of memory only where a reduction starts from slices.
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
    split = _reshaped(magnitude, _split(x.shape, blocks), _split_spec(magnitude))
    slices = _divisor(split.shape[-1], _SLICES) if x.ndim else 1
    folded = functools.reduce(jnp.maximum, jnp.split(split, slices, -1)) if slices > 1 else split
    largest = jnp.max(folded, axis=tuple(range(1, 2 * x.ndim, 2)))
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of its block for each element."""
    split = jnp.expand_dims(scales, tuple(range(1, 2 * len(shape), 2)))
    spread = jnp.broadcast_to(split, _split(shape, scales.shape))
    return _reshaped(spread, shape, explicit_spec(scales))


def _split(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for total, count in zip(shape, blocks, strict=True)
                 for n in (count, total // count))  # fmt: skip


def explicit_spec(x: jax.Array) -> tuple[Any, ...]:
    """The Explicit mesh axes over which each axis of ``x`` is split, None where there are none."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _split_spec(x: jax.Array) -> tuple[Any, ...]:
    """For the shape of :func:`_split`: the blocks are split over devices, not what is inside."""
    return tuple(axes for name in explicit_spec(x) for axes in (name, None))


def _reshaped(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    """JAX cannot tell how the result is split over Explicit axes, so it is told."""
    if not any(spec):
        return x.reshape(shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
    return jax.lax.reshape(x, shape, out_sharding=sharding)
