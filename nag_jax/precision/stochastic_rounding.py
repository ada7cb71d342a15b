"""Parameters in bfloat16 that move by the whole update in the mean."""

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import dtype_of
from nag_jax._checks import check_trainable, given_params
from nag_jax._types import Params, Updates, transformation
from nag_jax.precision.rounding import (
    NoiseState,
    check_seed,
    next_key,
    start_key,
    to_bfloat16,
    uniform_bits,
)
from nag_jax.precision.storage import map_numbered


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Last in a chain: bfloat16 parameters move by the whole update in the mean.

    ``optax.apply_updates`` rounds params + update to nearest, so every update below :math:`2^{-9}`
    of a parameter is lost. This replaces the update u of a bfloat16 parameter p by

    .. math::
        \mathrm{round}(p + u) - p, \qquad \mathrm{E}[\mathrm{round}(p + u)] = p + u

    in float32, where ``round`` picks one of the two bfloat16 numbers around p + u at random so that
    the mean is exact. The sum of p and the new update is that number, so ``optax.apply_updates``
    and ``flax.nnx.Optimizer`` return it exactly. No second copy of the parameters and no residual
    is kept.

    Parameters of 32 bits and more pass unchanged. The buffer should be wider than params or stored
    with stochastic rounding: ``accumulator_dtype=jnp.float32``,
    ``nag_jax.stochastic_bfloat16()`` or ``nag_jax.int8_blocks()``. JAX differentiates through the
    rounding as through its mean, the identity.

    Args:
      seed: an integer in [0, 2**32).

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params`` and returns
      float32 for bfloat16 parameters (with ``equinox.apply_updates`` cast the sum back; under
      ``jax_numpy_dtype_promotion="strict"`` add in float32, since ``optax.apply_updates`` raises).

    Raises:
      ValueError: if seed is not such an integer; from ``init``, for parameters of less than 32 bits
        other than bfloat16 and for those that are neither floating-point nor complex; from update,
        if it is called without params.

    Example:
      2000 updates of -0.0001 add up to -0.2:

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

    def init(params: Params) -> NoiseState:
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
        updates: Updates, state: NoiseState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, NoiseState]:
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

    return transformation(init, update)
