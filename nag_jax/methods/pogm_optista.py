"""POGM and OptISTA, for a loss plus a penalty or constraint and a known number N of steps.

They cannot be written as rules, because their proximal step starts elsewhere and is longer than the
gradient step, but they too need one buffer and a few scalars per step. With eps the learning rate,

    v      = prox(params + shift*m - gamma*eps*gradient, gamma*eps) - params
    update = direct*v + pull*m
    m'     = beta*m + kappa*v

Params are the iterate to evaluate. The steps after step N are proximal gradient descent.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import (
    applied,
    apply_prox,
    as_arrays,
    cast_like,
    filled,
    map_gradients,
    mix,
    wide,
    wide_zeros,
)
from nag_jax._checks import check_prox, check_range, given_params
from nag_jax._types import Params, Prox, Updates, transformation
from nag_jax.rules.rule import at_step, first_step, optimized_t


class CompositeState(NamedTuple):
    """State of :func:`pogm` and :func:`optista`."""

    m: Params  # the buffer, like params; float32 at least
    steps: jax.Array  # shape=(), int32


def pogm(
    learning_rate: optax.ScalarOrSchedule, prox: Prox, *, horizon: int
) -> optax.GradientTransformationExtraArgs:
    r"""POGM, the proximal optimized gradient method, for a known number of steps.

    The paper's three sequences need one buffer, which is kept in float32 at least:

    .. math::
        x_{k+1} = \mathrm{prox}_{r_k \epsilon}(x_k + a_k m_k - r_k \epsilon \nabla f(x_k)), \qquad
        m_{k+1} = \frac{a_k}{r_k} m_k + \Bigl(1 - \frac{1}{r_k}\Bigr) (x_{k+1} - x_k)

    with :math:`a_k = (t_k - 1)/t_{k+1}`, :math:`r_k = 1 + (2 t_k - 1)/t_{k+1}` and the t of
    ``rules.ogm(horizon)``, which is the same method without a prox. For the learning rate 1/L,
    :math:`F(x_N) - F^* \le L R^2 / N^2`, a bound found numerically; a rate faster than FISTA's was
    proved in 2025. The exact worst case after 10 steps is 0.71 of the bound
    (:doc:`the table of proofs </proved>`). Params are x. They are sparse or feasible at every step,
    so f need not be defined elsewhere. :func:`optista` has a better bound.

    Args:
      learning_rate: :math:`\epsilon`, at least 0, best 1/L and not above it, L the smoothness of
        the loss without the penalty; or a schedule of the integer step, without the bound.
      prox: ``(tree, step) -> tree``, of a penalty or constraint, from ``nag_jax.proximal``.
      horizon: the number of steps N, at least 1. Later steps are proximal gradient descent.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Under
      ``inject_hyperparams`` prox and horizon are static arguments.

    Raises:
      ValueError: for arguments out of range or a prox that does not take (tree, step); from init,
        if a parameter is neither floating-point nor complex; from update, without params.

    Example:
      All gradients are taken at feasible points, unlike those of FISTA:

      >>> prox = nag_jax.proximal.nonnegative()
      >>> for optimizer in (nag_jax.fista(1.0, prox), nag_jax.pogm(1.0, prox, horizon=20)):
      ...     params, lowest = jnp.array(2.0), 0.0
      ...     state = optimizer.init(params)
      ...     for _ in range(20):
      ...         lowest = min(lowest, float(params))
      ...         updates, state = optimizer.update(0.1 * (params + 1), state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     print(f"{nag_jax.eval_params(params, state):.2f}, lowest query {lowest:.2f}")
      0.00, lowest query -0.09
      0.00, lowest query 0.00

    References:
      Taylor, Hendrickx, Glineur, Exact worst-case performance of first-order methods for composite
      convex optimization, 2015, arXiv:1512.07516. Kim, Fessler, Adaptive restart of
      the optimized gradient method for convex optimization, 2017, arXiv:1703.04641. Optimized
      methods for composite optimization: a reduction perspective, 2025, arXiv:2506.23756.
    """
    t = optimized_t(horizon)
    # Plain Python floats: the coefficients depend on N alone, not on the learning rate.
    table = []
    for now, new in itertools.pairwise(t):
        a, r = (now - 1) / new, 1 + (2 * now - 1) / new
        table.append((r, a, 1.0, 0.0, a / r, 1 - 1 / r))
    return _method("pogm", learning_rate, prox, [*table, (1.0, 0.0, 1.0, 0.0, 0.0, 0.0)])


def optista(
    learning_rate: optax.ScalarOrSchedule, prox: Prox, *, horizon: int
) -> optax.GradientTransformationExtraArgs:
    r"""OptISTA, with the best possible worst case of N proximal gradient steps, half of FISTA's.

    .. math::
        y_{k+1} = \mathrm{prox}_{\gamma_k \epsilon}(y_k - \gamma_k \epsilon \nabla f(x_k)),
        \qquad
        x_{k+1} = x_k + \frac{r_k}{\gamma_k} (y_{k+1} - y_k) + b_k (y_k - x_k)

    with the t of ``rules.ogm(horizon)``,
    :math:`\gamma_k = 2 t_k (t_N^2 - 2 t_k^2 + t_k) / t_N^2`,
    :math:`r_k = 1 + (2 t_k - 1)/t_{k+1}` and
    :math:`b_{k+1} = \frac{t_{k+1} - 1}{t_{k+2}} \frac{r_k - 1}{\gamma_k - r_k}`, :math:`b_0 = 0`.
    In the paper x is computed from a third sequence, z, but :math:`x - z` is a multiple of y - x,
    so one buffer, y - x in float32 at least, is enough. For the learning rate 1/L,
    :math:`F(x_N) - F^* \le L R^2 / (2 (t_N^2 - 1))`, which no such method beats. It is
    attained (:doc:`the table of proofs </proved>`).

    Params are x, an average of the start and the proximal points :math:`y_1 .. y_k`, so they
    satisfy a convex constraint if the start does. Only at step N is x itself proximal,
    :math:`x_N = y_N`: sparse, feasible from any start, and within the bound.

    Args:
      learning_rate: :math:`\epsilon`, at least 0, best 1/L and not above it, L the smoothness of
        the loss without the penalty; or a schedule of the integer step, without the bound.
      prox: ``(tree, step) -> tree``, of a penalty or constraint, from ``nag_jax.proximal``.
      horizon: the number of steps N, at least 1. Later steps are proximal gradient descent.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Under
      ``inject_hyperparams`` prox and horizon are static arguments.

    Raises:
      ValueError: for arguments out of range or a prox that does not take (tree, step); from init,
        if a parameter is neither floating-point nor complex; from update, without params.

    Example:
      The error after a hundred steps on a problem that is hard for both methods:

      >>> slope, prox = 2e-4, nag_jax.proximal.nonnegative()
      >>> for optimizer in (nag_jax.fista(1.0, prox), nag_jax.optista(1.0, prox, horizon=100)):
      ...     result = nag_jax.minimize(
      ...         lambda p: slope * p, 1.0, optimizer, prox=prox, tol=0.0, max_steps=100)
      ...     print(f"{result.value / slope:.2f}")
      0.73
      0.46

    References:
      Jang, Das Gupta, Ryu, Computer-assisted design of accelerated composite optimization methods:
      OptISTA, 2023, arXiv:2305.15704.
    """
    t = optimized_t(horizon)
    table, pull = [], 0.0
    for k in range(horizon - 1):
        r = 1 + (2 * t[k] - 1) / t[k + 1]
        gamma = 2 * t[k] * (1 - (2 * t[k] - 1) * t[k] / t[-1] ** 2)
        direct = r / gamma
        table.append((gamma, 1.0, direct, pull - direct, direct - pull, 1 - direct))
        pull = (t[k + 1] - 1) / t[k + 2] * (r - 1) / (gamma - r)
    # At step N x is y. With these coefficients nothing has to cancel, so its zeros are exact.
    last = 1 + (2 * t[-2] - 1) / t[-1]
    table += [(last, 1.0, 1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)]
    return _method("optista", learning_rate, prox, table)


def _method(
    name: str, learning_rate: optax.ScalarOrSchedule, prox: Prox, table: list[tuple[float, ...]]
) -> optax.GradientTransformationExtraArgs:
    """The method with gamma, shift, direct, pull, beta, kappa of each step as rows of a table."""
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    check_prox(prox)

    def init(params: Params) -> CompositeState:
        return CompositeState(wide_zeros(params), first_step())

    def update(
        updates: Updates, state: CompositeState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, CompositeState]:
        del extra_args
        state = as_arrays(state)
        params, k = given_params(name, params), state.steps
        # The last row is proximal gradient descent, for all steps after N.
        row = jnp.asarray(table, float)[jnp.minimum(k, len(table) - 1)]
        gamma, shift, direct, pull, beta, kappa = row
        lr = gamma * at_step(learning_rate, k)
        point = map_gradients(
            lambda g, p, m: wide(p) + mix(shift, m, -lr, g), updates, params, state.m
        )
        after = apply_prox(prox, point, lr)
        v = map_gradients(lambda g, p, x: wide(x) - wide(p), updates, params, after)
        moves = map_gradients(lambda v, m: mix(direct, v, pull, m), v, state.m)
        updates = map_gradients(lambda g, move: cast_like(move, g), updates, moves)
        # The buffer takes up what rounding removes from low-precision params.
        keep = lambda u, p, move, v, m: mix(beta, m, kappa, v) + move - applied(u, p)
        m = map_gradients(
            lambda *leaves: keep(*leaves).astype(leaves[-1].dtype),
            updates, params, moves, v, state.m,
        )  # fmt: skip
        return updates, CompositeState(filled(m, state.m), jnp.asarray(optax.safe_increment(k)))

    return transformation(init, update)
