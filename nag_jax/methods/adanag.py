"""AdaNAG: Nesterov's method that measures the curvature, without one evaluation more."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import (
    as_arrays,
    cast_like,
    dtype_of,
    filled,
    map_gradients,
    ratio,
    real_like,
    wide,
    wide_zeros,
)
from nag_jax._checks import check_range, given_scalar
from nag_jax._reductions import inner_product
from nag_jax._step_size import guess, within
from nag_jax.kernel import AccelerateState, accelerate
from nag_jax.rules.rule import Coefficients, Rule, first_step

_PROBE = 1e-3  # of the first guess
_ROUNDING = 8  # of values, in units of the precision
_FIRST = 27 / 12030 * (3 / 12) * (15 / 12) / (9 / 336)  # s_0 times the curvature


class AdaNAGState(NamedTuple):
    """State of :func:`adanag`."""

    kernel: AccelerateState  # its carry is k, the steps taken
    gradient: Any  # the last one, like params; float32 at least
    value: jax.Array  # the last one, shape=(), default float dtype
    learning_rate: jax.Array  # the last one, shape=(), default float dtype; 0: none yet
    curvature: jax.Array  # the last estimate, shape=(), default float dtype; 0: none


def adanag(
    *, initial: float | None = None, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""AdaNAG: accelerated, no L, no line search, nothing but the values and gradients at hand.

    Each call measures the curvature along the last step and bounds the learning rate by it,

    .. math::
        L_{k+1} = \frac{\|\Delta g\|^2 / 2}
            {\langle g_{k+1}, \Delta x \rangle - \Delta f}, \qquad
        s_{k+1} = \min \Bigl\{ \frac{A_{k-1} + a_k}{A_k} s_k,
            \Bigl(\frac{A_k}{a_k^2} + \frac{2 a_{k+1}^2}{A_k}\Bigr)^{-1} \frac{1}{L_{k+1}} \Bigr\}

    with :math:`a_k = (k+3)^2 / (24 (k+14))`, :math:`A_k = a_{k+1} (k+3)/12`, :math:`A_{-1} = 0`;
    then, with :math:`u = -s_k g_k` and :math:`\tau_k = (k+14)/12`, it steps by the kernel's rule

    .. math::
        m' = \frac{(\tau_k - 1) m + (a_k - 1) u}{\tau_{k+1}}, \qquad x_{k+1} = x_k + u + m'

    The guarantee is :math:`f(x_k) - f^* \le R^2 / (2 A_k s_k)`, with :math:`A_k \approx k^2/288`.
    Params are x: gradients are taken where the guarantee holds. It is a whole optimizer: no
    learning rate before it, nothing after it, no prox. The first call only tries the ground: a
    short step along the gradient, which the second takes back.

    Near the minimum the denominator of L drowns in the rounding of f. Below 8 units of that it is
    replaced by :math:`\langle \Delta g, \Delta x \rangle / 2`, the same for quadratics.

    Args:
      initial: learning rate of that first trial, above 0; None: :math:`10^{-3} |f| / \|g\|^2`,
        which has the right units, so that f may be multiplied by anything.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``; value has to
        be that of all devices then.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``value``; no ``value_fn``.
      It keeps two buffers, the kernel's and the last gradient. In its state is ``learning_rate``.

    Raises:
      ValueError: for an initial that is not above 0; from init, if a parameter is neither
        floating-point nor complex; from update, if called without value.

    The point: curvatures of any size, one value and one gradient a step.

    >>> optimizer = nag_jax.adanag()
    >>> @jax.jit
    ... def step(params, state, scale):
    ...     loss = lambda p: scale * jnp.sum(jnp.array([1.0, 0.01]) * (p - 1) ** 2)
    ...     value, gradient = jax.value_and_grad(loss)(params)
    ...     updates, state = optimizer.update(gradient, state, params, value=value)
    ...     return optax.apply_updates(params, updates), state
    >>> for scale in (1e-6, 1.0, 1e6):
    ...     params = jnp.zeros(2)
    ...     state = optimizer.init(params)
    ...     for _ in range(200):
    ...         params, state = step(params, state, scale)
    ...     print([f"{x:.2f}" for x in params])
    ['1.00', '1.00']
    ['1.00', '1.00']
    ['1.00', '1.00']

    References:
      Suh, Ma, An adaptive and parameter-free Nesterov's accelerated gradient method for convex
      optimization, 2025, arXiv:2505.11670.
    """
    if initial is not None:
        check_range("initial", initial, 0.0, low_open=True)
    kernel = accelerate(_rule())

    def init(params: optax.Params) -> AdaNAGState:
        scalar = lambda: jnp.zeros([], float)
        start: Any = kernel.init(params)
        return AdaNAGState(start, wide_zeros(params), scalar(), scalar(), scalar())

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaNAGState]:
        del params, extra_args
        if value is None:
            raise ValueError(
                "adanag needs the value of the loss: call optimizer.update(gradients, state, "
                "params, value=value)"
            )
        state = as_arrays(state)
        lr, k, g = state.learning_rate, state.kernel.carry, updates
        value = given_scalar("value", value).astype(lr.dtype)
        first, second = lr == 0, (lr > 0) & (k == 0)
        dot = lambda a, b: inner_product(a, b, axis_name).astype(lr.dtype)
        last = map_gradients(lambda g, last: last, g, state.gradient)
        moved = map_gradients(lambda g, m: wide(m) - real_like(lr, g) * g, last, state.kernel.m)
        curvature = jnp.where(first, 0, _curvature(g, last, moved, value, state.value, dot))
        probe = _PROBE * guess(value, dot(g, g)) if initial is None else initial
        new_lr = jnp.where(first, jnp.asarray(probe, lr.dtype), _learning_rate(k, lr, curvature))

        # The second call steps from where the first one was, by the gradient there.
        g = map_gradients(lambda g, last: jnp.where(second, last, wide(g)), g, last)
        rate = jnp.where(first, 0, new_lr)
        u = map_gradients(lambda g: -real_like(rate, g) * g, g)
        inner: Any = kernel.update(u, state.kernel)[1]
        direct = jnp.where(second, lr, 0) - new_lr
        updates = map_gradients(
            lambda given, g, m: cast_like(real_like(direct, g) * g + wide(m), given),
            updates,
            g,
            inner.m,
        )
        gradient = map_gradients(lambda g, old: g.astype(old.dtype), g, state.gradient)
        return updates, AdaNAGState(
            kernel=inner._replace(carry=jnp.where(first, k, inner.carry)),
            gradient=filled(gradient, state.gradient),
            value=jnp.where(second, state.value, value),
            learning_rate=new_lr,
            curvature=curvature,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _rule() -> Rule:
    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        tau = lambda k: (k + 14) / 12
        i = k.astype(float)
        beta, kappa = (tau(i) - 1) / tau(i + 1), (_a(i) - 1) / tau(i + 1)
        return jnp.asarray(optax.safe_increment(k)), Coefficients(beta, kappa, readout=0.0)

    return Rule(first_step, step, at_params=True)


def _a(k: Any) -> Any:
    return (k + 3) ** 2 / (24 * (k + 14))


def _learning_rate(k: jax.Array, s: jax.Array, curvature: jax.Array) -> jax.Array:
    """s_k, from s_{k-1} and the curvature between the last two points; s_0 for k = 0."""
    i = jnp.maximum(k.astype(s.dtype) - 1, 0)
    a, after = _a(i), _a(i + 1)
    mass = after * (i + 3) / 12
    grown = jnp.where(k > 1, a * (i + 14) / 12, a) / mass * s  # A_{k-1} + a_k = a_k tau_k, but at 0
    first = jnp.where(k == 0, _FIRST, 1 / (mass / a**2 + 2 * after**2 / mass))
    bound = ratio(first, curvature)
    unbounded = jnp.where(k == 0, s, grown)
    measured = (curvature > 0) & jnp.isfinite(curvature)
    limit = jnp.where(k == 0, bound, jnp.minimum(bound, grown))
    return within(jnp.where(measured, limit, unbounded))


def _curvature(g: Any, before: Any, moved: Any, value: Any, last: Any, dot: Any) -> jax.Array:
    """Of the loss between the last two points; 0 if there is none to see."""
    change = map_gradients(lambda g, before: wide(g) - before, g, before)
    eps = max((float(jnp.finfo(dtype_of(x)).eps) for x in jax.tree.leaves(g)), default=0.0)
    rounding = _ROUNDING * eps * jnp.maximum(jnp.abs(value), jnp.abs(last))
    bent = dot(g, moved) - (value - last)
    bent = jnp.where(bent < rounding, jnp.maximum(dot(change, moved) / 2, 0), bent)
    return ratio(dot(change, change) / 2, bent)
