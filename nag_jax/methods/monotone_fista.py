"""Monotone FISTA. It is not a rule, because it evaluates the objective before accepting a step."""

from collections.abc import Callable
from typing import NamedTuple

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
from nag_jax._types import ArrayLike, Params, PyTree, Updates, transformation
from nag_jax.kernel import shifted


class MonotoneState(NamedTuple):
    """State of :func:`monotone_fista`."""

    m: Params  # params - x, like params; float32 at least
    t: jax.Array  # FISTA's t, shape=(), default float dtype
    best: jax.Array  # the objective at x, shape=(), default float dtype

    def iterate(self, params: Params) -> Params:
        """Returns x, for :func:`eval_params`."""
        only_scalar(self.t)  # raises for a stack of states
        return shifted(params, self.m, -1.0)


def monotone_fista(
    objective: Callable[[PyTree], ArrayLike],
) -> optax.GradientTransformationExtraArgs:
    r"""MFISTA: FISTA with an objective that never increases, for one more evaluation per step.

    .. math::
        z = y + u, \qquad x' = \arg\min_{\{z, x\}} F, \qquad
        y' = x' + \frac{t}{t'} (z - x') + \frac{t - 1}{t'} (x' - x)

    with FISTA's t and FISTA's bound, and FISTA's exact worst case where that was computed
    (:doc:`the table of proofs </proved>`). Use it instead of ``accelerate(rules.fista())``. In the
    terms of the kernel, with w = m + u: if z is accepted, m' = (t-1)/t' w and update = u + m';
    otherwise m' = t/t' w and update = m' - m.

    The buffer, x and z have at least float32, and F(x) increases by no more than their rounding. If
    params are bfloat16, ``eval_params`` rounds x to bfloat16, where F may increase (give it a
    float32 copy of params for x itself), and y stops where steps are below half a unit in its last
    place, much earlier than in float32. F is not evaluated at the start, so the first step is
    always accepted.

    Args:
      objective: ``F(tree) -> scalar``, the loss plus the penalty, finite at proximal points. The
        tree is like params, in at least float32 where there is a gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``.

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

    def init(params: Params) -> MonotoneState:
        # With infinity as the best value so far, the first step is always accepted.
        return MonotoneState(wide_zeros(params), jnp.ones([], float), jnp.full([], jnp.inf, float))

    def update(
        updates: Updates, state: MonotoneState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, MonotoneState]:
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
        # m' and the update of the docstring, for both cases in one expression.
        m = map_gradients(lambda u, m: real_like(scale, m) * (m + u), steps, state.m)
        moves = map_gradients(
            lambda u, old, new: jnp.where(accept, u, -old) + new, steps, state.m, m
        )
        updates = map_gradients(lambda u, move: cast_like(move, u), updates, moves)
        # The buffer takes up what rounding removes from low-precision params, so that x is exact.
        m = map_gradients(
            lambda u, p, move, m, old: (m + (applied(u, p) - move)).astype(old.dtype),
            updates, params, moves, m, state.m,
        )  # fmt: skip
        return updates, MonotoneState(filled(m, state.m), new, jnp.where(accept, value, best))

    return transformation(init, update)
