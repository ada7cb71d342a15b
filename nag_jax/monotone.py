"""FISTA that never gets worse: a kernel of its own, since it looks before it takes a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import filled, map_gradients, real_like, wide
from nag_jax._checks import given_params
from nag_jax.kernel import AccelerateState


def monotone_fista(objective: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    r"""MFISTA: FISTA whose evaluated iterate never gets worse, for one evaluation more a step.

    .. math::
        z = y + u, \qquad x' = \arg\min_{\{z, x\}} F, \qquad
        y' = x' + \frac{t}{t'} (z - x') + \frac{t - 1}{t'} (x' - x)

    with FISTA's t and FISTA's bound. It stands where ``accelerate(rules.fista())`` would. In the
    kernel's terms, with w = m + u: m' = (t-1)/t' w and update = u + m' if z is taken, else
    m' = t/t' w and update = m' - m.

    Args:
      objective: ``F(tree) -> scalar``, the loss with its penalty, finite at proximal points.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: from update, if it is called without params.

    >>> objective = lambda p: jnp.sum(p**2) / 2 + jnp.sum(jnp.abs(p))
    >>> head = nag_jax.proximal.prox_step(nag_jax.proximal.l1(1.0), 1.0)
    >>> optimizer = optax.chain(head, nag_jax.monotone_fista(objective))

    References:
      Beck, Teboulle, Fast gradient-based algorithms for constrained total variation image
      denoising and deblurring problems, IEEE Trans. Image Processing 18, 2009, section 5.
    """

    def init(params: optax.Params) -> AccelerateState:
        one, inf = jnp.ones([], float), jnp.full([], jnp.inf, float)
        m = jax.tree.map(jnp.zeros_like, params)
        return AccelerateState(m=m, carry=(one, inf), readout=-one)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccelerateState]:
        del extra_args
        params = given_params("monotone_fista", params)
        t, best = state.carry
        z = optax.apply_updates(params, filled(updates, optax.tree.zeros_like(params)))
        value = jnp.asarray(objective(z), best.dtype)
        accept = value <= best
        new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        scale = jnp.where(accept, t - 1, t) / new
        m = map_gradients(
            lambda u, m: (real_like(scale, m) * (wide(m) + wide(u))).astype(m.dtype),
            updates,
            state.m,
        )
        updates = map_gradients(
            lambda u, old, new: (jnp.where(accept, wide(u), -wide(old)) + new).astype(u.dtype),
            updates,
            state.m,
            m,
        )
        carry = (new, jnp.where(accept, value, best))
        return updates, AccelerateState(m=filled(m, state.m), carry=carry, readout=state.readout)

    return optax.GradientTransformationExtraArgs(init, update)
