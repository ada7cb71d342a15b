"""Momentum in int8: blocks of numbers that share one float32 scale."""

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
    to_bfloat16,
    uniform_bits,
)
from nag_jax.precision.storage import Storage, map_numbered, zeros

_TINY = 1e-37  # a block of a smaller scale is stored as 0: its reciprocal might overflow
_LANES = 128  # a TPU keeps arrays in tiles of so many numbers along the last axis ...
_LARGE = 2**16  # fewer elements take less time to copy than to start the kernel that does
_TILE = 32  # ... and so many int8 numbers, or 8 float32 numbers, along the one before it


class BlockState(NamedTuple):
    """What ``int8_blocks`` adds to the state of ``accelerate``."""

    key: jax.Array  # of the noise of the next step, shape=(2,), uint32
    scales: Params  # like params: float32, one for each block; int8 zeros where m is not int8
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
    block_size: int = 128,
    min_size: int = _LARGE,
    shards: int = 8,
    differentiable: bool = False,
) -> Storage:
    r"""A momentum buffer of about 1 byte a parameter: int8 numbers, one float32 scale a block.

    For ``accumulator_dtype``. With :math:`s = \max_{block}|m| / 127`, the stored number is
    :math:`q = \lfloor m/s + u \rfloor` with u uniform in [0, 1). The buffer is
    :math:`\hat m = s q`, off by less than s and equal to m in the mean.

    A block is up to ``block_size`` consecutive elements along one axis: the last but one, or an
    earlier one that splits into longer blocks. A matrix has blocks of 128 rows of one column. A TPU
    can find the largest number of such a block and use its scale without a copy of the leaf. For
    that the last axis must be a multiple of 128 and the blocks a multiple of 32. A vector has
    blocks of 128. Other leaves, such as an embedding with an odd number of rows, are stored like
    :func:`nag_jax.stochastic_bfloat16`. Leaves with fewer than ``min_size`` elements stay float32.
    If that is below the default, other leaves of fewer elements than the default have blocks along
    the last axis.

    A step reads the gradient and the old buffer twice: once for the new scales, and again to encode
    with them. So it moves at least 19.1 bytes a parameter, more than the 16 of
    ``stochastic_bfloat16``: int8 saves memory, not time. On a TPU a matrix whose number of blocks
    along the rows is not a power of two takes 20.4.

    The buffer ``m`` has the shapes of params, and ``scales`` has the same tree and ranks with as
    many entries along each axis as there are blocks, so a ``PartitionSpec`` of params fits both:
    block lengths divide the equal shards of each axis for any number of devices that divides
    ``shards``, so that no block crosses from one device to another. The noise is as in
    :func:`nag_jax.stochastic_bfloat16`, but inside ``shard_map`` all shards of a leaf use the same.

    Integers have no derivative in JAX. To differentiate through steps inside ``jit`` or
    ``lax.scan``, set ``differentiable``: the state then holds zeros whose derivative is that of the
    buffer. Where ``jax.grad`` or ``jax.jvp`` is applied to the Python code of the steps, ``update``
    adds these zeros by itself.

    Args:
      seed: an integer in [0, 2**32).
      block_size: the largest number of elements of a block, an int of at least 1. The buffer takes
        1 + 4/block_size bytes a parameter where it divides an axis.
      min_size: leaves with fewer elements stay float32, as do empty ones, and complex ones
        complex64. An int of at least 0.
      shards: the largest number of equal shards along one axis that blocks must respect, an int of
        at least 1. For parameters that are split over Explicit axes of a mesh, a multiple of the
        number of devices along each axis.
      differentiable: whether to keep room for a derivative, 4 bytes a parameter.

    Returns:
      A storage for ``accelerate``, ``nag`` and the recipes.

    Raises:
      ValueError: for arguments out of range; from ``init``, for parameters that are split over more
        devices than shards allows; when the derivative of an update inside ``jit`` or ``lax.scan``
        is taken without ``differentiable``.

    Example:
      >>> params = {"kernel": jnp.ones((1024, 1024)), "bias": jnp.ones(1024)}
      >>> optimizer = nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks())
      >>> state = optimizer.init(params)
      >>> size = sum(x.nbytes for x in jax.tree.leaves(state))
      >>> print(f"{size / (1024 * 1024 + 1024):.2f} bytes a parameter")
      1.03 bytes a parameter

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit optimizers via block-wise quantization, 2021,
      arXiv:2110.02861 (there with nearest rounding and a non-linear code).
    """
    check_seed(seed)
    for name, value in (("block_size", block_size), ("min_size", min_size), ("shards", shards)):
        check_count(name, value, 0 if name == "min_size" else 1, static=True)

    def float_zeros(tree: Params) -> Params:
        return jax.tree.map(lambda m: jnp.zeros_like(m, jnp.float32), tree)

    def init(params: Params) -> tuple[Params, BlockState]:
        def narrow(m: jax.Array) -> jax.Array:
            if m.dtype == jnp.int8 and block(m.shape, block_size, shards) is None:
                return jnp.zeros_like(m, jnp.bfloat16)
            return m

        def scale(m: jax.Array) -> jax.Array:
            if m.dtype != jnp.int8:
                return jnp.zeros_like(m, jnp.int8)
            return zero_scales(m, block_size, shards)

        m = zeros(params, jnp.int8, max(min_size, 1))  # there is no block of an empty leaf
        m = jax.tree.map(narrow, m)
        derivative = float_zeros(m) if differentiable else ()
        return m, BlockState(start_key(seed), jax.tree.map(scale, m), derivative)

    def store(x: Updates, m: Params, memory: BlockState) -> tuple[Params, BlockState]:
        derivative = memory.derivative
        if not jax.tree.leaves(derivative) and differentiated(x):
            derivative = float_zeros(m)
        kept = jax.tree.leaves(derivative)

        def encoded(leaf: int, x: jax.Array, m: jax.Array, scales: jax.Array) -> jax.Array:
            if m.dtype == jnp.int8:
                x = x if kept else not_differentiable(x)
                return encode(x, scales, uniform_bits(memory.key, leaf, x.shape))
            if m.dtype == jnp.bfloat16:
                bits = uniform_bits(memory.key, leaf, x.shape)
                return to_bfloat16(x.astype(jnp.float32), bits).astype(m.dtype)
            return x.astype(m.dtype)

        def followed(x: jax.Array, m: jax.Array, old: jax.Array) -> jax.Array:
            return zero_like(x.astype(old.dtype)) if m.dtype == jnp.int8 else old

        if kept:
            derivative = filled(map_gradients(followed, x, m, derivative), derivative)
        scales = filled(map_gradients(rescale, x, memory.scales), memory.scales)
        m = filled(map_numbered(encoded, x, m, scales), m)
        return m, BlockState(next_key(memory.key), scales, derivative)

    return Storage(init, store)


def block(shape: tuple[int, ...], block_size: int, shards: int) -> tuple[int, int] | None:
    """The axis along which a leaf has blocks and their length; None for a leaf without blocks.

    A block never crosses the boundary between two of gcd(axis, shards) equal shards.
    """
    shard = [length // math.gcd(length, shards) for length in shape]
    if len(shape) > 1 and shape[-1] % _LANES == 0:
        fitting = [(_divisor(n, block_size, _TILE), axis) for axis, n in enumerate(shard[:-1])]
        length, axis = max(fitting)
        if length:
            return axis, length
    if len(shape) == 1 and shard[0] % _LANES == 0 and block_size >= _LANES:
        return 0, _LANES  # in memory, these are the rows of a matrix
    if not shape or math.prod(shape) >= _LARGE:
        return None
    return len(shape) - 1, _divisor(shard[-1], block_size, 1)


def _divisor(n: int, at_most: int, of: int) -> int:
    """The largest divisor of n of at most ``at_most`` that is a multiple of ``of``, or 0."""
    return next((d for d in range(at_most // of * of, 0, -of) if n % d == 0), 0)


def zero_scales(m: jax.Array, block_size: int, shards: int) -> jax.Array:
    """The scales of a zero buffer, sharded as the buffer is."""
    fitting = block(m.shape, block_size, shards)
    assert fitting
    axis, length = fitting
    counts = (*m.shape[:axis], m.shape[axis] // length, *m.shape[axis + 1 :])
    mesh, spec = jax.typeof(m).sharding.mesh, _explicit_spec(m)
    parts = [math.prod(mesh.shape[name] for name in jax.tree.leaves(axes)) for axes in spec]
    if any(n % devices for n, devices in zip(counts, parts, strict=True)):
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
    return _largest(jax.lax.stop_gradient(x), scales.shape) / 127


@jax.jit
def encode(x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
    """``x`` in units of its scales, stochastically rounded to int8 by 16 random ``bits``."""
    inverse = jnp.where(scales > _TINY, 1 / scales, 0)
    noise = (bits.astype(jnp.float32) + 0.5) / 2**16
    q = jnp.floor(x.astype(jnp.float32) * _spread(inverse, x.shape) + noise)
    return jnp.where(jnp.isnan(x), 0, jnp.clip(q, -127, 127)).astype(jnp.int8)  # NaN is in scales


@jax.jit
def decode(m: jax.Array, scales: jax.Array) -> jax.Array:
    """The float32 numbers that ``encode`` stored; ``m`` itself where it is not int8."""
    if m.dtype != jnp.int8:
        return m
    return m.astype(jnp.float32) * _spread(scales, m.shape)


def _largest(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """The largest magnitude in each block, float32; NaN where there is one."""
    magnitude = jnp.abs(x).astype(jnp.float32)
    axis, blocks = _blocks(x.shape, counts)
    # For other numbers of blocks, XLA on TPU does not fuse the maximum over whole blocks with what
    # computes x: it would write x to memory. It fuses the maximum over a tile, so that comes first.
    if axis == x.ndim - 2 and blocks & (blocks - 1):
        tiles = x.shape[axis] // 8
        magnitude = jax.lax.optimization_barrier(_largest_of(magnitude, axis, tiles))
    return _largest_of(magnitude, axis, blocks)


def _largest_of(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """The maximum over each of so many equal parts of an axis."""
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    spec = list(_explicit_spec(x))
    spec.insert(axis + 1, None)  # the blocks are split over devices, not what is inside
    return jnp.max(_reshaped(x, shape, spec), axis=axis + 1)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of its block for each element."""
    axis, blocks = _blocks(shape, scales.shape)
    inside = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), inside)
    return _reshaped(spread, shape, _explicit_spec(scales))


def _blocks(shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, int]:
    """The axis along which a leaf has blocks, and their number."""
    split = (axis for axis, n in enumerate(counts) if n != shape[axis])
    axis = next(split, len(shape) - 1)
    return axis, counts[axis]


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
