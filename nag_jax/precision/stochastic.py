"""Fewer bytes: momentum in bfloat16 or int8, and bfloat16 parameters that do not stall.

Rounding to nearest drops every change below half a unit in the last place, so a momentum that
tends to its limit in small steps never gets there. Stochastic rounding moves to one of the two
neighbours with probabilities that make the mean exact: what one step loses another one gains.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import dtype_of, filled, map_gradients
from nag_jax._checks import check_count, check_trainable, given_params
from nag_jax.precision.blocks import (
    BlockState,
    encode,
    not_differentiable,
    rescale,
    zero_like,
    zero_scales,
)
from nag_jax.precision.rounding import (
    check_seed,
    differentiated,
    next_key,
    start_key,
    to_bfloat16,
    uniform_bits,
)
from nag_jax.precision.storage import Storage, map_numbered, zeros


class NoiseState(NamedTuple):
    """What stochastic rounding remembers between two steps."""

    key: jax.Array  # of the noise of the next step, shape=(2,), uint32


def stochastic_bfloat16(seed: int = 0) -> Storage:
    r"""A momentum buffer of 2 bytes a parameter that reaches its limit.

    For ``accumulator_dtype``. All arithmetic is float32; the new buffer is stored in bfloat16 by
    stochastic rounding, and the update is made from what was stored. A single stored number is
    off by less than :math:`2^{-7}` of itself, and its mean is exact.

    The noise is a function of seed, step, leaf and element alone: the same on all replicas, for
    any sharding under ``jit``, and after a restart from a checkpoint. Complex parameters keep
    a complex64 buffer. JAX differentiates through the rounding as through its mean, the identity,
    with derivatives that the buffer holds in bfloat16.

    Args:
      seed: an integer in [0, 2**32).

    Returns:
      A storage for ``accelerate``, ``nag`` and the recipes.

    Raises:
      ValueError: if seed is no such integer.

    The point: a constant gradient of 1 drives momentum 0.999 to 1000. Rounded to nearest, the
    buffer stops at about a quarter of that:

    >>> import warnings
    >>> for dtype in (jnp.float32, nag_jax.stochastic_bfloat16(), jnp.bfloat16):
    ...     kernel = nag_jax.accelerate(rules.trace(0.999), accumulator_dtype=dtype)
    ...     with warnings.catch_warnings(action="ignore"):
    ...         state = kernel.init(jnp.zeros(4096))
    ...     step = lambda state, _: (kernel.update(jnp.ones(4096), state)[1], None)
    ...     state, _ = jax.lax.scan(step, state, length=10_000)
    ...     print(round(float(jnp.mean(state.m.astype(float))), -1))
    1000.0
    1000.0
    260.0

    References:
      Gupta, Agrawal, Gopalakrishnan, Narayanan, Deep learning with limited numerical precision,
      2015, arXiv:1502.02551. Zamirai, Zhang, Aberger, De Sa, Revisiting bfloat16 training, 2020,
      arXiv:2010.06192.
    """
    check_seed(seed)

    def init(params: Any) -> tuple[Any, NoiseState]:
        return zeros(params, jnp.bfloat16), NoiseState(start_key(seed))

    def store(x: Any, m: Any, memory: Any) -> tuple[Any, NoiseState]:
        def rounded(leaf: int, x: jax.Array, m: jax.Array) -> jax.Array:
            if m.dtype != jnp.bfloat16:
                return x.astype(m.dtype)
            bits = uniform_bits(memory.key, leaf, x.shape)
            return to_bfloat16(x.astype(jnp.float32), bits).astype(m.dtype)

        return filled(map_numbered(rounded, x, m), m), NoiseState(next_key(memory.key))

    return Storage(init, store)


def int8_blocks(
    seed: int = 0,
    *,
    block_size: int = 128,
    min_size: int = 4096,
    shards: int = 8,
    differentiable: bool = False,
) -> Storage:
    r"""A momentum buffer of about 1 byte a parameter: int8 numbers, one float32 scale a block.

    For ``accumulator_dtype``. With :math:`s = \max_{block}|m| / 127`, the stored number is
    :math:`q = \lfloor m/s + U \rfloor` with U uniform in [0, 1), that is
    :math:`|qs - m| < s` for every element and :math:`E[qs] = m`: an outlier of size A makes its
    neighbours uncertain by A/127 in one step, and shifts none of them in the mean. Scales are
    float32, so momenta of 1e-30 and 1e+30 survive (a block below 1e-36 is stored as 0).

    The buffer ``m`` has the shapes of params, and ``scales`` has the same tree and ranks with as
    many entries along each axis as there are blocks, so a ``PartitionSpec`` of params fits both:
    block lengths divide the equal shards of each axis for any number of devices that divides
    ``shards``, so that no block crosses from one device to another. The noise is as in
    :func:`stochastic_bfloat16`, but inside ``shard_map`` all shards of a leaf use the same.

    Integers have no derivative in JAX. To differentiate through steps inside ``jit`` or
    ``lax.scan``, set ``differentiable``: the state then holds zeros whose derivative is that of the
    buffer. Where ``jax.grad`` or ``jax.jvp`` is applied to the Python code of the steps, ``update``
    adds these zeros by itself.

    Args:
      seed: an integer in [0, 2**32).
      block_size: most elements of a block, an int of at least 1. 1 + 4/block_size bytes a
        parameter, or more where few lengths divide an axis.
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

    >>> params = {"kernel": jnp.ones((512, 1024)), "bias": jnp.ones(1024)}
    >>> optimizer = nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks())
    >>> state = optimizer.init(params)
    >>> size = sum(x.nbytes for x in jax.tree.leaves(state))
    >>> print(f"{size / (512 * 1024 + 1024):.2f} bytes a parameter")
    1.04 bytes a parameter

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit optimizers via block-wise quantization, 2021,
      arXiv:2110.02861 (there with nearest rounding and a non-linear code).
    """
    check_seed(seed)
    for name, value in (("block_size", block_size), ("min_size", min_size), ("shards", shards)):
        check_count(name, value, 0 if name == "min_size" else 1, static=True)

    float_zeros = functools.partial(jax.tree.map, lambda m: jnp.zeros_like(m, jnp.float32))

    def init(params: Any) -> tuple[Any, BlockState]:
        def scale(m: jax.Array) -> jax.Array:
            if m.dtype != jnp.int8:
                return jnp.zeros_like(m, jnp.int8)
            return zero_scales(m, block_size, shards)

        m = zeros(params, jnp.int8, max(min_size, 1))  # there is no block of an empty leaf
        derivative = float_zeros(m) if differentiable else ()
        return m, BlockState(start_key(seed), jax.tree.map(scale, m), derivative)

    def store(x: Any, m: Any, memory: Any) -> tuple[Any, BlockState]:
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


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Last in a chain: bfloat16 parameters move by the whole update in the mean.

    ``optax.apply_updates`` rounds params + update to nearest, so updates below
    :math:`2^{-9}` of a parameter are lost, each and every one. This replaces the update by
    the float32 difference to one of the two bfloat16 around params + update, chosen at random so
    that the mean is exact; ``optax.apply_updates`` and ``flax.nnx.Optimizer`` then land on it.
    No second copy of the parameters and no residual is kept.

    Parameters of 32 bits and more pass unchanged. Keep the buffer wider than params or unbiased:
    ``accumulator_dtype=jnp.float32`` or one of the storages here. JAX differentiates through the
    rounding as through its mean, the identity.

    Args:
      seed: an integer in [0, 2**32).

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params`` and returns
      float32 for bfloat16 parameters (with ``equinox.apply_updates`` cast the sum back; under
      ``jax_numpy_dtype_promotion="strict"`` add in float32, since ``optax.apply_updates`` raises).

    Raises:
      ValueError: if seed is no such integer; from ``init``, for parameters of less than 32 bits
        other than bfloat16 and for those that are neither floating-point nor complex; from update,
        if it is called without params.

    The point: 2000 updates of -0.0001 add up to -0.2.

    >>> for tail in (optax.identity(), nag_jax.stochastic_rounding()):
    ...     optimizer = optax.chain(optax.sgd(1e-4), tail)
    ...     params = jnp.ones(4096, jnp.bfloat16)
    ...     def step(carry, _):
    ...         updates, state = optimizer.update(jnp.ones(4096), carry[1], carry[0])
    ...         return (optax.apply_updates(carry[0], updates), state), None
    ...     carry = (params, optimizer.init(params))
    ...     (params, _), _ = jax.lax.scan(step, carry, length=2000)
    ...     print(f"{jnp.mean(params.astype(float)):.2f}")
    1.00
    0.80

    References:
      Zamirai, Zhang, Aberger, De Sa, Revisiting bfloat16 training, 2020, arXiv:2010.06192.
    """
    check_seed(seed)

    def init(params: optax.Params) -> NoiseState:
        check_trainable("stochastic rounding", params)
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            dtype = jnp.result_type(p)
            if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.bfloat16:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path) or 'params'} has dtype {dtype}; "
                    "stochastic rounding needs bfloat16 or at least 32 bits. Exclude it with "
                    "optax.masked."
                )
        return NoiseState(start_key(seed))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NoiseState]:
        del extra_args
        params = given_params("stochastic_rounding", params)

        def rounded(leaf: int, u: jax.Array, p: jax.Array) -> jax.Array:
            if dtype_of(p) != jnp.bfloat16:
                return u
            wide = p.astype(jnp.float32)
            target = wide + jnp.asarray(u, jnp.float32)
            return to_bfloat16(target, uniform_bits(state.key, leaf, p.shape)) - wide

        updates = map_numbered(rounded, updates, params)
        return updates, NoiseState(next_key(state.key))

    return optax.GradientTransformationExtraArgs(init, update)
