"""Momentum in bfloat16, stochastically rounded so that it reaches its limit."""

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import filled
from nag_jax._types import Params, Updates
from nag_jax.precision.rounding import (
    NoiseState,
    check_seed,
    next_key,
    start_key,
    to_bfloat16,
    uniform_bits,
)
from nag_jax.precision.storage import Storage, map_numbered, zeros


def stochastic_bfloat16(seed: int = 0) -> Storage:
    r"""A momentum buffer of 2 bytes a parameter that reaches its limit.

    For ``accumulator_dtype``. All arithmetic is float32. The new buffer is stored in bfloat16 by
    stochastic rounding, which picks one of the two neighbouring bfloat16 numbers at random so that
    the mean is exact:

    .. math::
        \hat m \in \{\lfloor m \rfloor, \lceil m \rceil\}, \qquad \mathrm{E}[\hat m] = m, \qquad
        |\hat m - m| < 2^{-7} |m|

    The update is made from the stored buffer. Rounding to nearest would drop every change below
    half a unit in the last place, so a momentum that approaches its limit in small steps would
    never reach it.

    The noise depends on seed, step, leaf and element alone. It is the same on all replicas, for any
    sharding under ``jit``, and after a restart from a checkpoint. Complex parameters keep a
    complex64 buffer. JAX differentiates through the rounding as through its mean, the identity; the
    buffer holds derivatives in bfloat16.

    Args:
      seed: an integer in [0, 2**32).

    Returns:
      A storage for ``accelerate``, ``nag`` and the recipes.

    Raises:
      ValueError: if seed is not such an integer.

    Example:
      A constant gradient of 1 drives momentum 0.999 to 1000. Rounded to nearest, the buffer stops
      at about a quarter of that:

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

    def init(params: Params) -> tuple[Params, NoiseState]:
        return zeros(params, jnp.bfloat16), NoiseState(start_key(seed))

    def store(x: Updates, m: Params, memory: NoiseState) -> tuple[Params, NoiseState]:
        def rounded(leaf: int, x: jax.Array, m: jax.Array) -> jax.Array:
            if m.dtype != jnp.bfloat16:
                return x.astype(m.dtype)
            bits = uniform_bits(memory.key, leaf, x.shape)
            return to_bfloat16(x.astype(jnp.float32), bits).astype(m.dtype)

        return filled(map_numbered(rounded, x, m), m), NoiseState(next_key(memory.key))

    return Storage(init, store)
