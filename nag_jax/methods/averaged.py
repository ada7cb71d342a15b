"""Averaging of the params of any optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import (
    applied,
    as_arrays,
    filled,
    map_gradients,
    real_like,
    wide_zeros,
)
from nag_jax._checks import check_optimizer, check_range, check_trainable, given_params
from nag_jax._paths import only_scalar
from nag_jax._types import OptState, Params, Updates, transformation
from nag_jax.kernel import shifted


class AverageState(NamedTuple):
    """State of :func:`averaged`."""

    offset: Params  # average - params, like params; float32 at least
    steps: jax.Array  # shape=(), int32
    inner: OptState  # of the wrapped optimizer

    def iterate(self, params: Params) -> Params:
        """Returns the average, for :func:`eval_params`."""
        only_scalar(self.steps)  # raises for a stack of states
        return shifted(params, self.offset, 1.0)


def averaged(
    optimizer: optax.GradientTransformation, power: float = 8.0
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that ``eval_params`` returns a weighted average of its params.

    Params are the same as without the wrapper. ``eval_params`` gives the polynomial-decay average

    .. math::
        \bar y_{k+1} = \bar y_k + w_k (y_{k+1} - \bar y_k), \qquad
        w_k = \frac{1 + p}{k + 1 + p}

    in which step k of K has a weight proportional to about :math:`(k/K)^p`. It averages over about
    the last K/(p + 1) steps, for every K. With a constant learning rate it has the effect of a
    decay to zero, and the number of steps need not be known. It keeps one buffer, average - params,
    in at least float32. A leaf without a gradient (None) does not move, and is averaged like that.

    Args:
      optimizer: a whole optimizer; no link that changes updates may follow in the chain. The
        iterate of an ``accelerate`` inside it is not used.
      power: p, at least 0; 0 gives the plain mean.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``.

    Raises:
      ValueError: if power is out of range or optimizer is not a gradient transformation; from init,
        if a parameter is neither floating-point nor complex; from update, without params.

    Example:
      The average has far less of the gradient's noise than the last params:

      >>> optimizer = nag_jax.averaged(nag_jax.nag(0.05, 0.9))
      >>> def step(carry, noise):
      ...     params, state = carry
      ...     updates, state = optimizer.update(params + noise, state, params)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> noise = jax.random.normal(jax.random.key(0), (2000, 50))
      >>> params = jnp.ones(50)
      >>> (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), noise)
      >>> for point in (params, nag_jax.eval_params(params, state)):
      ...     print(f"{jnp.linalg.norm(point):.1f}")
      3.1
      0.4

    References:
      Shamir, Zhang, Stochastic gradient descent for non-smooth optimization: convergence results
      and optimal averaging schemes, 2013, arXiv:1212.1824, section 4. Power 8 as in Ivgi, Hinder,
      Carmon, DoG is SGD's best friend, 2023, arXiv:2302.12022.
    """
    check_range("power", power, 0.0)
    check_optimizer("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> AverageState:
        check_trainable("averaging", params)
        return AverageState(wide_zeros(params), jnp.zeros([], jnp.int32), optimizer.init(params))

    def update(
        updates: Updates, state: AverageState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, AverageState]:
        params = given_params("averaged", params)
        offset, steps, inner = as_arrays(state)
        updates, inner = optimizer.update(updates, inner, params, **extra_args)
        # 1 - w_k. In float, since integers would overflow.
        k = steps.astype(float)
        keep = k / (k + 1 + power)
        # Where there is no update, params do not move and the average approaches them.
        moved = filled(
            map_gradients(applied, updates, params), jax.tree.map(jnp.zeros_like, offset)
        )
        # average' - params' = (1 - w_k) (average - params - move)
        follow = lambda m, move: (real_like(keep, m) * (m - move)).astype(m.dtype)
        offset = jax.tree.map(follow, offset, moved)
        return updates, AverageState(offset, jnp.asarray(optax.safe_increment(steps)), inner)

    return transformation(init, update)
