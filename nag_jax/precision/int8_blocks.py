"""Momentum in int8: blocks of numbers that share one float32 scale."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nag_jax._arithmetic import filled, map_gradients
from nag_jax._checks import check_count
from nag_jax._types import AxisName, Params, Updates
from nag_jax.precision.derivatives import differentiated, not_differentiable, zero_like
from nag_jax.precision.rounding import (
    check_seed,
    next_key,
    start_key,
    uniform_bits,
)
from nag_jax.precision.storage import Storage, map_numbered, zeros

_LEVELS = 127
_TINY = 1e-34  # a block of smaller numbers is stored as 0: the reciprocal might overflow
_LANES = 128  # of a TPU: a vector is stored like the rows of a matrix of so many columns


class BlockState(NamedTuple):
    """What ``int8_blocks`` adds to the state of ``accelerate``."""

    key: jax.Array  # of the noise of the next step, shape=(2,), uint32
    scales: Params  # like params: largest magnitude of each block, float32; int8 zeros if no blocks
    derivative: Params = ()  # like params, float32: zeros that carry the derivative of m, if kept

    def decode(self, m: Params) -> Params:
        """The buffer to compute with."""
        values = jax.tree.map(decode, m, self.scales)
        if not jax.tree.leaves(self.derivative):
            return values
        return jax.tree.map(lambda x, zero: x + zero.astype(x.dtype), values, self.derivative)


def int8_blocks(
    seed: int = 0,
    *,
    block_size: int = 64,
    min_size: int = 2**16,
    shards: int = 1,
    differentiable: bool = False,
) -> Storage:
    r"""A momentum buffer of about 1 byte a parameter: int8 numbers, one float32 scale a block.

    For ``accumulator_dtype``. With s the largest magnitude in a block, the stored number is an
    integer q from -127 to 127 that stands for

    .. math::
        \hat m = s\, \mathrm{sign}(q)\, (q / 127)^2, \qquad \mathrm{E}[\hat m] = m, \qquad
        |\hat m - m| \le \frac{2 \sqrt{s |m|}}{127} + \frac{s}{127^2}

    The square makes the steps between small numbers small, so that a large number in a block costs
    the others little. Of the two nearest such values one is chosen at random so that the mean is
    exact.

    A block is a row of a leaf: all elements along its last axis, or along the last one with at
    least ``block_size`` elements. A vector has blocks of 128 elements if its length is a multiple
    of that. XLA finds the largest number of such a block, and uses it, without a copy on GPU and
    TPU. A step reads the gradient and the old buffer twice, once for the new scales and again to
    encode with them. So it moves at least 19 bytes a parameter, more than the 16 of
    :func:`nag_jax.stochastic_bfloat16`: int8 saves memory, not time.

    The buffer ``m`` has the shapes of params. ``scales`` has the same tree and ranks, with as many
    entries along each axis as there are blocks. Under ``jit`` parameters and state may be split
    over devices in any way. A block that is split needs an all-reduce of its largest number. With
    ``shards`` set to the number of devices along an axis, or a multiple, no block is split, and a
    ``PartitionSpec`` of params also fits ``scales``; this is needed inside ``shard_map`` and for a
    sharding of the state that is derived from that of params. Where blocks need not be split,
    leave it at 1: more blocks in a row are slow on a TPU.

    The noise is as in :func:`nag_jax.stochastic_bfloat16`, but inside ``shard_map`` all shards of a
    leaf use the same.

    Integers have no derivative in JAX. To differentiate through steps inside ``jit`` or
    ``lax.scan``, set ``differentiable``: the state then holds zeros whose derivative is that of the
    buffer. Where ``jax.grad`` or ``jax.jvp`` is applied to the Python code of the steps, ``update``
    adds these zeros by itself.

    Args:
      seed: an integer in [0, 2**32).
      block_size: the smallest number of elements of a block, if an axis has as many, an int of at
        least 1. The buffer takes at most 1 + 4/block_size bytes a parameter.
      min_size: leaves with fewer elements stay float32, as do empty ones, and complex ones
        complex64. An int of at least 0. For small leaves int8 would be slower than float32.
      shards: the number of equal shards along one axis that blocks must respect, as far as they
        divide the axis, an int of at least 1.
      differentiable: whether to keep room for a derivative, 4 bytes a parameter.

    Returns:
      A storage for ``accelerate``, ``nag`` and the recipes.

    Raises:
      ValueError: for arguments out of range; from ``init``, if shards is above 1 and parameters are
        split over Explicit axes of a mesh into other shards; when the derivative of an update
        inside ``jit`` or ``lax.scan`` is taken without ``differentiable``.

    Example:
      >>> params = {"kernel": jnp.ones((512, 1024)), "bias": jnp.ones(1024)}
      >>> optimizer = nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks())
      >>> state = optimizer.init(params)
      >>> size = sum(x.nbytes for x in jax.tree.leaves(state))
      >>> print(f"{size / (512 * 1024 + 1024):.2f} bytes a parameter")
      1.01 bytes a parameter

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit optimizers via block-wise quantization, 2021,
      arXiv:2110.02861 (there with nearest rounding and another non-linear code).
    """
    check_seed(seed)
    for name, value in (("block_size", block_size), ("min_size", min_size), ("shards", shards)):
        check_count(name, value, 0 if name == "min_size" else 1, static=True)

    def float_zeros(tree: Params) -> Params:
        return jax.tree.map(lambda m: jnp.zeros_like(m, jnp.float32), tree)

    def init(params: Params) -> tuple[Params, BlockState]:
        def scale(m: jax.Array) -> jax.Array:
            if m.dtype != jnp.int8:
                return jnp.zeros_like(m, jnp.int8)
            return scales_of(m, block_size, shards)

        m = zeros(params, jnp.int8, max(min_size, 2))  # empty leaves and scalars have no block
        derivative = float_zeros(m) if differentiable else ()
        return m, BlockState(start_key(seed), jax.tree.map(scale, m), derivative)

    def store(x: Updates, m: Params, memory: BlockState) -> tuple[Params, BlockState]:
        derivative = memory.derivative
        if not jax.tree.leaves(derivative) and differentiated(x):
            derivative = float_zeros(m)
        kept = jax.tree.leaves(derivative)

        def encoded(leaf: int, x: jax.Array, m: jax.Array, scales: jax.Array) -> jax.Array:
            if m.dtype != jnp.int8:
                return x.astype(m.dtype)
            x = x if kept else not_differentiable(x)
            return encode(x, scales, uniform_bits(memory.key, leaf, x.shape))

        def followed(x: jax.Array, m: jax.Array, old: jax.Array) -> jax.Array:
            return zero_like(x.astype(old.dtype)) if m.dtype == jnp.int8 else old

        if kept:
            derivative = filled(map_gradients(followed, x, m, derivative), derivative)
        scales = filled(map_gradients(rescale, x, memory.scales), memory.scales)
        m = filled(map_numbered(encoded, x, m, scales), m)
        return m, BlockState(next_key(memory.key), scales, derivative)

    return Storage(init, store)


def blocks(shape: tuple[int, ...], block_size: int, shards: int) -> tuple[int, ...]:
    """The number of blocks along each axis of a leaf."""
    long = (axis for axis in reversed(range(len(shape))) if shape[axis] >= block_size)
    axis = next(long, max(range(len(shape)), key=lambda axis: shape[axis]))
    count = math.gcd(shape[axis], shards)
    if len(shape) == 1 and shape[0] // count % _LANES == 0:
        count = shape[0] // _LANES
    return (*shape[:axis], count, *shape[axis + 1 :])


def scales_of(m: jax.Array, block_size: int, shards: int) -> jax.Array:
    """The scales that ``m`` needs, sharded as ``m`` is."""
    counts = blocks(m.shape, block_size, shards)
    mesh, spec = jax.typeof(m).sharding.mesh, _explicit_spec(m)
    parts = [math.prod(mesh.shape[name] for name in jax.tree.leaves(axes)) for axes in spec]
    if shards > 1 and any(n % devices for n, devices in zip(counts, parts, strict=True)):
        raise ValueError(
            f"shards must be a multiple of the devices that a parameter is split over, {parts} "
            f"along the axes of shape {m.shape}, got {shards}; pass "
            f"int8_blocks(shards={math.lcm(shards, *parts)})"
        )
    return _largest(m, counts)


@jax.jit  # as those below: traced once for leaves of one shape
def rescale(x: jax.Array, scales: jax.Array) -> jax.Array:
    """The scales that ``x`` needs; those of a leaf that is not int8 as they are."""
    if scales.dtype != jnp.float32:
        return scales
    return _largest(jax.lax.stop_gradient(x), scales.shape)


@functools.partial(jax.jit, static_argnums=3)
def encode(x: jax.Array, scales: jax.Array, bits: jax.Array, levels: int = _LEVELS) -> jax.Array:
    """The integers from -levels to levels that stand for ``x``, stochastically rounded.

    ``bits`` are 16 random bits for each element.
    """
    inverse = jnp.where(scales > _TINY, levels**2 / scales, 0)
    square = jnp.abs(x).astype(jnp.float32) * _spread(inverse, x.shape)
    q = jnp.floor(jnp.sqrt(square))
    # Between q**2 and (q + 1)**2, up with the probability that makes the mean exact.
    noise = (bits.astype(jnp.float32) + 0.5) / 2**16
    q = jnp.minimum(jnp.where(square - q * q > noise * (2 * q + 1), q + 1, q), levels)
    signed = jnp.where(x < 0, -q, q)
    return jnp.where(jnp.isfinite(square), signed, 0).astype(jnp.int8)  # or the scale shows it


@functools.partial(jax.jit, static_argnums=2)
def decode(m: jax.Array, scales: jax.Array, levels: int = _LEVELS) -> jax.Array:
    """The float32 numbers that ``encode`` stored; ``m`` itself where it is not int8."""
    if m.dtype != jnp.int8:
        return m
    q = m.astype(jnp.float32)
    return q * jnp.abs(q) * _spread(scales / levels**2, m.shape)


def _largest(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """The largest magnitude in each block, float32; infinite if a number is not finite."""
    magnitude = jnp.abs(x).astype(jnp.float32)
    # In jax 0.10 and 0.12 the maximum of an array on CPU may ignore a NaN.
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    axis = _axis(x.shape, counts)
    if counts[axis] == 1:
        return jnp.max(magnitude, axis=axis, keepdims=True)
    shape = (*counts[: axis + 1], x.shape[axis] // counts[axis], *counts[axis + 1 :])
    spec = list(_explicit_spec(x))
    spec.insert(axis + 1, None)  # the blocks are split over devices, not what is inside
    return jnp.max(_reshaped(magnitude, shape, spec), axis=axis + 1)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What to multiply a leaf of this shape by, so that each element meets that of its block."""
    axis = _axis(shape, scales.shape)
    if scales.shape[axis] == 1:
        return scales
    inside = (*scales.shape[: axis + 1], shape[axis] // scales.shape[axis], *shape[axis + 1 :])
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), inside)
    return _reshaped(spread, shape, _explicit_spec(scales))


def _axis(shape: tuple[int, ...], counts: tuple[int, ...]) -> int:
    """The axis along which a leaf has blocks."""
    split = (axis for axis, n in enumerate(counts) if n != shape[axis])
    return next(split, len(shape) - 1)


def _explicit_spec(x: jax.Array) -> tuple[AxisName, ...]:
    """The Explicit mesh axes over which each axis of ``x`` is split, None where there are none."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _reshaped(x: jax.Array, shape: tuple[int, ...], spec: Sequence[AxisName]) -> jax.Array:
    """JAX cannot tell how the result is split over Explicit axes, so it is told."""
    if not any(spec):
        return x.reshape(shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
    return jax.lax.reshape(x, shape, out_sharding=sharding)
