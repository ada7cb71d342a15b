"""Stochastic rounding to bfloat16, with noise that depends on seed, step, leaf and element."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax._checks import check_range
from nag_jax._types import ArrayLike


class NoiseState(NamedTuple):
    """What stochastic rounding remembers between two steps."""

    key: jax.Array  # of the noise of the next step, shape=(2,), uint32


def start_key(seed: ArrayLike) -> jax.Array:
    """The key of the first step, shape=(2,), uint32."""
    return next_key(jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.zeros([], jnp.uint32)]))


def next_key(key: jax.Array) -> jax.Array:
    """The key of the step after that of ``key``."""
    first = _hash(key[0] + jnp.uint32(0x9E3779B9))
    return jnp.stack([first, _hash(key[1] + first)])


def check_seed(seed: object) -> None:
    """Raises ValueError unless ``seed`` is an integer in [0, 2**32), or traced."""
    dtype = getattr(seed, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError("seed must be an integer, got a key; use jax.random.bits(key)")
    whole = isinstance(seed, int) if dtype is None else jnp.issubdtype(dtype, jnp.integer)
    if not whole:
        raise ValueError(f"seed must be an integer, got {seed!r}")
    check_range("seed", seed, 0, 2**32)


def uniform_bits(key: jax.Array, leaf: int, shape: tuple[int, ...]) -> jax.Array:
    """16 random bits for each element, uint32 of the given shape.

    An integer hash of the element's index, so that it costs a few instructions inside the loop
    that uses it, and is the same however the array is sharded. jax.random would take longer than
    the whole step. Keys are hashed once a step, not for each leaf, which would take long to
    compile for thousands of leaves.
    """
    # An array, as XLA keeps that out of the loop: loops of leaves of one shape are then the same
    # program, and compiled once.
    own = np.array([leaf * 0x9E3779B9 % 2**32, leaf * 0x85EBCA6B % 2**32], np.uint32)
    return _bits(key, own, shape)


@functools.partial(jax.jit, static_argnums=2)  # traced once for leaves of one shape
def _bits(key: jax.Array, own: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    start, between = (key + own)[0], (key ^ own)[1]
    index = jnp.broadcast_to(start, shape)
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += along if stride == 1 else along * jnp.uint32(stride)
    return _multiply(index, between) >> 16


def _multiply(x: jax.Array, between: jax.Array) -> jax.Array:
    # The constants are those of C. Wellons, "Prospecting for hash functions", lowbias32.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x ^ between
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def _hash(x: jax.Array) -> jax.Array:
    x = _multiply(x, jnp.uint32(0))
    return x ^ (x >> 16)


@jax.custom_jvp
@jax.jit
def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """``x``, float32, moved to one of the two bfloat16 around it, so that the mean is ``x``.

    The result is float32: its conversion to bfloat16 is exact. A NaN must be one that arithmetic
    gives, with the first bit of its fraction set. The derivative is that of the mean.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    moved = jnp.where(jnp.isfinite(x), raw + bits, raw)
    # The mask comes last: so the compiler sees that nothing is left to round in a conversion.
    return jax.lax.bitcast_convert_type(moved & jnp.uint32(0xFFFF0000), jnp.float32)


@to_bfloat16.defjvp
def _to_bfloat16_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    # Its derivative is 1 without a rule: in forward over reverse mode through a scan, JAX before
    # 0.12 forgets that of to_bfloat16.
    x, change = primals[0], to_bfloat16(*primals) - primals[0]
    return x + jax.lax.stop_gradient(jnp.where(jnp.isfinite(x), change, 0)), tangents[0]
