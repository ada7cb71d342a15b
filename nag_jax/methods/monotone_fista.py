"""FISTA that never gets worse: a kernel of its own, since it evaluates a step before taking it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
from nag_jax._checks import as_static, given_params, given_scalar
from nag_jax._paths import only_scalar
from nag_jax.kernel import shifted


class MonotoneState(NamedTuple):
    """State of :func:`monotone_fista`."""

    m: optax.Updates  # params - x, like params; float32 at least
    t: jax.Array  # FISTA's t, shape=(), default float dtype
    best: jax.Array  # the objective at x, shape=(), default float dtype

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns x, for :func:`eval_params`."""
        only_scalar(self.t)
        return shifted(params, self.m, -1.0)


def monotone_fista(objective: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    r"""MFISTA: FISTA whose evaluated iterate never gets worse, for one more evaluation per step.

    .. math::
        z = y + u, \qquad x' = \arg\min_{\{z, x\}} F, \qquad
        y' = x' + \frac{t}{t'} (z - x') + \frac{t - 1}{t'} (x' - x)

    with FISTA's t and FISTA's bound. It takes the place of ``accelerate(rules.fista())``. In the
    kernel's terms, with w = m + u: m' = (t-1)/t' w and update = u + m' if z is taken, else
    m' = t/t' w and update = m' - m.

    The buffer, x and z are float32 at least, and F(x) grows by no more than their rounding. For
    bfloat16 params ``eval_params`` returns x rounded to them, where F may grow (x itself for a
    float32 copy of params), and y stops where steps are below half a unit of its last place, long
    before float32 params do. F is not evaluated at the start, so the first step is always taken.

    Args:
      objective: ``F(tree) -> scalar``, the loss with its penalty, finite at proximal points; the
        tree is like params, in float32 at least where there is a gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: if objective is not a function; from init, if a parameter is neither
        floating-point nor complex; from update, if objective does not return a real scalar, or
        without params.

    Example:
      >>> objective = lambda p: jnp.sum(p**2) / 2 + jnp.sum(jnp.abs(p))
      >>> head = nag_jax.proximal.prox_step(nag_jax.proximal.l1(1.0), 1.0)
      >>> optimizer = optax.chain(head, nag_jax.monotone_fista(objective))

    References:
      Beck, Teboulle, Fast gradient-based algorithms for constrained total variation image
      denoising and deblurring problems, IEEE Trans. Image Processing 18, 2009, section 5.
    """
    if not callable(objective):
        raise ValueError(
            f"objective must be a function params -> scalar, got {objective!r}; "
            f"{as_static('objective')}"
        )

    def init(params: optax.Params) -> MonotoneState:
        return MonotoneState(wide_zeros(params), jnp.ones([], float), jnp.full([], jnp.inf, float))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, MonotoneState]:
        del extra_args
        params = given_params("monotone_fista", params)
        state = as_arrays(state)
        t, best = state.t, state.best
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
        return updates, MonotoneState(filled(m, state.m), new, jnp.where(accept, value, best))

    return optax.GradientTransformationExtraArgs(init, update)
