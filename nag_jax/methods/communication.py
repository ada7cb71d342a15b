"""What workers send each other at a meeting: their displacements in fewer bytes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from nag_jax._arithmetic import dtype_of, map_gradients, ratio, real_like, wide, wide_zeros
from nag_jax._types import AxisName, DTypeLike, Params, PyTree, Updates
from nag_jax.precision.int8_blocks import decode, encode, scales_of
from nag_jax.precision.rounding import next_key, start_key, to_bfloat16, uniform_bits
from nag_jax.precision.storage import map_numbered

DTYPES = (jnp.bfloat16, jnp.int8, jnp.int4)
_BLOCK = 64  # the fewest numbers that share a scale
_MIN_SIZE = 1024  # smaller leaves are sent as they are


class FeedbackState(NamedTuple):
    """What a worker remembers between two meetings if it sends fewer bytes."""

    residual: Params  # like params, float32 at least: what it has not sent yet
    key: jax.Array  # of the noise of the next meeting, shape=(2,), uint32


class _Sent(NamedTuple):
    """A leaf as it is sent."""

    numbers: jax.Array
    scales: jax.Array | tuple[()] = ()  # float32, of blocks; () if there are none


def start(params: Params) -> FeedbackState:
    """The state before the first meeting."""
    return FeedbackState(wide_zeros(params), start_key(0))


def mean_of_workers(
    tree: Updates,
    state: FeedbackState,
    axis_name: AxisName,
    weight: jax.Array | None,
    dtype: DTypeLike,
) -> tuple[Updates, PyTree, FeedbackState]:
    """The mean of what the workers send, bit for bit the same on all, and the sum of the weights.

    A worker sends its tree plus the residual of its last meeting, stochastically rounded to
    ``dtype``, and keeps the rounding error as the next residual (error feedback). int8 and int4 are
    coded as in :func:`nag_jax.int8_blocks`, with one scale for each row of a leaf; complex and
    small leaves are sent unrounded. Each tree travels around the ring of K workers, in K - 1
    messages, and is rounded only once. A worker of weight 0 counts nothing and keeps its residual.
    The sum is ``()`` without weights.
    """
    own = jax.lax.axis_index(axis_name).astype(jnp.uint32)
    key = state.key + own * jnp.uint32(0x9E3779B9)  # else all workers would round alike
    whole = map_gradients(lambda x, r: wide(x) + r, tree, state.residual)
    sent = map_numbered(lambda leaf, x: _encoded(x, uniform_bits(key, leaf, x.shape), dtype), whole)
    arrived, weights = _from_all((sent, weight), axis_name)
    workers, total = jax.lax.psum(1, axis_name), ()
    shares = [1 / workers] * workers
    if weight is not None:
        total = jnp.sum(weights)
        shares = list(ratio(weights, total))

    def mean(x: jax.Array, sent: _Sent) -> jax.Array:
        """Summed in the order of the workers, so that all of them round in the same way."""
        mean = jnp.zeros_like(x)
        for worker, share in enumerate(shares):
            part = jax.tree.map(lambda s: s[worker], sent)  # noqa: B023
            mean += real_like(share, x) * _decoded(part, x, dtype)
        return mean

    kept = map_gradients(lambda x, sent: x - _decoded(sent, x, dtype), whole, sent)
    if weight is not None:  # a worker that does not count has sent nothing
        kept = map_gradients(lambda new, old: jnp.where(weight > 0, new, old), kept, state.residual)
    new = FeedbackState(kept, next_key(state.key))
    return map_gradients(mean, whole, arrived), total, new


def _from_all(tree: PyTree, axis_name: AxisName) -> PyTree:
    """``tree`` of all workers along a new first axis, in their order."""
    # all_gather would first gather what is split over other axes of the mesh.
    count = jax.lax.psum(1, axis_name)
    ring = [(i, (i + 1) % count) for i in range(count)]
    message, unpack = _in_one_array(tree) if fully_manual() else (tree, lambda message: message)
    arrived = [message]
    for _ in range(count - 1):
        arrived.append(jax.lax.ppermute(arrived[-1], axis_name, ring))
    order = (jax.lax.axis_index(axis_name) - jnp.arange(count)) % count
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves)[order], *arrived)
    return jax.vmap(unpack)(stacked)


def fully_manual() -> bool:
    """Whether this is inside a ``shard_map`` over all axes of its mesh.

    Only then may arrays be joined to be sent together. Otherwise they may be split over another
    axis, and would be gathered first; and under ``vmap`` nothing is sent.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types or ()
    return bool(kinds) and all(kind == AxisType.Manual for kind in kinds)


def _in_one_array(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """The bits of all leaves in one vector of integers, and the function that unpacks them."""
    leaves, structure = jax.tree.flatten(tree)
    integer = jnp.uint16 if any(x.dtype == jnp.bfloat16 for x in leaves) else jnp.uint8
    packed = [_bits(x, integer) for x in leaves]
    ends = np.cumsum([x.size for x in packed])

    def unpack(message: jax.Array) -> PyTree:
        parts = jnp.split(message, ends[:-1])
        return structure.unflatten(map(_from_bits, parts, leaves))

    return jnp.concatenate(packed), unpack


def _bits(x: jax.Array, integer: DTypeLike) -> jax.Array:
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.int4:  # two in a byte, from the halves of the leaf
        low, high = jnp.split(jnp.pad(x.astype(jnp.int8).ravel(), (0, x.size % 2)), 2)
        x = (low & 15) | (high << 4)
    return jax.lax.bitcast_convert_type(x, integer).ravel()


def _from_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    """The array like ``like`` of which these are the ``_bits``."""
    if like.dtype == jnp.int4:
        both = jax.lax.bitcast_convert_type(bits, jnp.int8)
        halves = (both << 4) >> 4, both >> 4  # the second shift repeats the sign
        return jnp.concatenate(halves)[: like.size].reshape(like.shape).astype(like.dtype)
    is_complex = jnp.iscomplexobj(like)
    dtype = jnp.finfo(like.dtype).dtype if jnp.issubdtype(like.dtype, jnp.inexact) else like.dtype
    shape = (2, *like.shape) if is_complex else like.shape
    each = dtype.itemsize // bits.dtype.itemsize
    x = jax.lax.bitcast_convert_type(bits.reshape(*shape, each) if each > 1 else bits, dtype)
    x = x.reshape(shape)
    return jax.lax.complex(*x) if is_complex else x


def _encoded(x: jax.Array, bits: jax.Array, dtype: DTypeLike) -> _Sent:
    if not _is_rounded(x):
        return _Sent(x)
    x = x.astype(jnp.float32)
    if dtype == jnp.bfloat16:
        return _Sent(to_bfloat16(x, bits).astype(jnp.bfloat16))
    scales = scales_of(x, _BLOCK, 1)
    numbers = encode(x, scales, bits, _levels(dtype))
    return _Sent(numbers.astype(dtype), scales)


def _decoded(sent: _Sent, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The numbers that were sent, in the shape and dtype of ``x``."""
    if not _is_rounded(x):
        return sent.numbers
    if isinstance(sent.scales, tuple):
        return sent.numbers.astype(x.dtype)
    return decode(sent.numbers.astype(jnp.int8), sent.scales, _levels(dtype)).astype(x.dtype)


def _is_rounded(x: jax.Array) -> bool:
    is_complex = jnp.issubdtype(dtype_of(x), jnp.complexfloating)
    return math.prod(x.shape) >= _MIN_SIZE and not is_complex


def _levels(dtype: DTypeLike) -> int:
    return jnp.iinfo(dtype).max
