"""The average of the iterates of any optimizer, as the iterate to evaluate."""

from typing import Any, NamedTuple

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
from nag_jax.kernel import shifted


class AverageState(NamedTuple):
    """State of :func:`averaged`."""

    offset: optax.Params  # average - params, like params; float32 at least
    steps: jax.Array  # shape=(), int32
    optimizer: Any  # the state of the optimizer

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns the average, for :func:`eval_params`."""
        only_scalar(self.steps)
        return shifted(params, self.offset, 1.0)


def averaged(
    optimizer: optax.GradientTransformation, power: float = 8.0
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, with the average of its params as the iterate to evaluate.

    Params move as without it; ``eval_params`` gives the polynomial-decay average

    .. math::
        \bar y_{k+1} = \bar y_k + w_k (y_{k+1} - \bar y_k), \qquad
        w_k = \frac{1 + p}{k + 1 + p}

    in which step k of K has weight near :math:`(k/K)^p`: about the last K/(p + 1) steps count,
    however long the run will be. With a constant learning rate it takes the place of a decay to
    zero, and needs no horizon. It costs one buffer, in float32 at least, of average - params. A
    leaf without a gradient (None) is averaged as one that stays where it is.

    Args:
      optimizer: a whole optimizer; nothing that changes updates may follow in the chain. If it
        holds an ``accelerate``, its own evaluation iterate gives way to the average.
      power: p, at least 0; 0 is the plain mean.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: if power is out of range or optimizer is not a gradient transformation; from init,
        if a parameter is neither floating-point nor complex; from update, without params.

    The point: noise that the last params still have is gone from their average.

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
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> AverageState:
        check_trainable("averaging", params)
        return AverageState(wide_zeros(params), jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AverageState]:
        params = given_params("averaged", params)
        state = as_arrays(state)
        offset, steps, memory = state
        updates, memory = inner.update(updates, memory, params, **extra_args)
        k = steps.astype(float)
        keep = k / (k + 1 + power)
        # A leaf without an update stays where it is, and its average comes nearer to that.
        moved = filled(
            map_gradients(applied, updates, params), jax.tree.map(jnp.zeros_like, offset)
        )
        follow = lambda m, move: (real_like(keep, m) * (m - move)).astype(m.dtype)
        offset = jax.tree.map(follow, offset, moved)
        return updates, AverageState(offset, jnp.asarray(optax.safe_increment(steps)), memory)

    return optax.GradientTransformationExtraArgs(init, update)
