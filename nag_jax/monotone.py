"""FISTA that never gets worse: a kernel of its own, since it looks before it takes a step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from nag_jax._arithmetic import (
    applied,
    as_arrays,
    cast_like,
    filled,
    map_gradients,
    real_like,
    wide,
    wide_zeros,
)
from nag_jax._checks import given_params, given_scalar
from nag_jax.kernel import AccelerateState


def monotone_fista(objective: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    r"""MFISTA: FISTA whose evaluated iterate never gets worse, for one evaluation more a step.

    .. math::
        z = y + u, \qquad x' = \arg\min_{\{z, x\}} F, \qquad
        y' = x' + \frac{t}{t'} (z - x') + \frac{t - 1}{t'} (x' - x)

    with FISTA's t and FISTA's bound. It stands where ``accelerate(rules.fista())`` would. In the
    kernel's terms, with w = m + u: m' = (t-1)/t' w and update = u + m' if z is taken, else
    m' = t/t' w and update = m' - m.

    The buffer, x and z are float32 at least, and F(x) grows by no more than their rounding. For
    bfloat16 params ``eval_params`` gives x rounded to them, where F may grow (x itself for a
    float32 copy of params), and y stops where steps are below half a unit of its last place, long
    before float32 params do. F is not evaluated at the start, so that the first step is taken
    wherever it leads.

    Args:
      objective: ``F(tree) -> scalar``, the loss with its penalty, finite at proximal points; the
        tree is like params, in float32 at least but for leaves without a gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: if objective is no function; from update, if objective returns no scalar or
        there are no params.

    >>> objective = lambda p: jnp.sum(p**2) / 2 + jnp.sum(jnp.abs(p))
    >>> head = nag_jax.proximal.prox_step(nag_jax.proximal.l1(1.0), 1.0)
    >>> optimizer = optax.chain(head, nag_jax.monotone_fista(objective))

    References:
      Beck, Teboulle, Fast gradient-based algorithms for constrained total variation image
      denoising and deblurring problems, IEEE Trans. Image Processing 18, 2009, section 5.
    """
    if not callable(objective):
        raise ValueError(f"objective must be a function params -> scalar, got {objective!r}")

    def init(params: optax.Params) -> AccelerateState:
        one, inf = jnp.ones([], float), jnp.full([], jnp.inf, float)
        return AccelerateState(m=wide_zeros(params), carry=(one, inf), readout=-one)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccelerateState]:
        del extra_args
        params = given_params("monotone_fista", params)
        state = as_arrays(state)
        t, best = state.carry
        steps = map_gradients(wide, updates)
        z = filled(map_gradients(lambda u, p: wide(p) + u, steps, params), params)
        value = given_scalar("what objective returns", objective(z)).astype(best.dtype)
        accept = value <= best
        new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        scale = jnp.where(accept, t - 1, t) / new
        m = map_gradients(lambda u, m: real_like(scale, m) * (m + u), steps, state.m)
        moves = map_gradients(
            lambda u, old, new: jnp.where(accept, u, -old) + new, steps, state.m, m
        )
        updates = map_gradients(lambda u, move: cast_like(move, u), updates, moves)
        # What low-precision params round away goes into the buffer, so that x is not rounded.
        m = map_gradients(
            lambda u, p, move, m, old: (m + (applied(u, p) - move)).astype(old.dtype),
            updates, params, moves, m, state.m,
        )  # fmt: skip
        carry = (new, jnp.where(accept, value, best))
        return updates, AccelerateState(m=filled(m, state.m), carry=carry, readout=state.readout)

    return optax.GradientTransformationExtraArgs(init, update)
