"""AdaNAG: Nesterov's method that measures the curvature, without one evaluation more."""

from collections.abc import Callable
from typing import NamedTuple, cast

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
from nag_jax._types import ArrayLike, AxisName, Params, Updates, transformation
from nag_jax.kernel import AccelerateState, accelerate
from nag_jax.rules.rule import Coefficients, Rule, first_step

_TRIAL, _BACK, _START = 0, 1, 2  # calls; the last makes the step of k = 0
_PROBE = 1e-3  # of the first guess
_ROUNDING = 8  # of values, in units of the precision
_FIRST = 27 / 12030 * (3 / 12) * (15 / 12) / (9 / 336)  # s_0 times the curvature


class AdaNAGState(NamedTuple):
    """State of :func:`adanag`."""

    inner: AccelerateState  # of the momentum; its carry is the number of calls
    gradient: Params  # the last one, like params; float32 at least
    value: jax.Array  # the last one, shape=(), default float dtype
    learning_rate: jax.Array  # the last one, shape=(), default float dtype; 0: none yet
    curvature: jax.Array  # the last estimate, shape=(), default float dtype; 0: none


def adanag(
    *, initial: float | None = None, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""AdaNAG: accelerated gradient steps whose length follows from the gradients and values seen.

    It needs neither the smoothness constant L nor a line search, and one gradient and its value
    each step. Each call measures the curvature along the last step and bounds the learning rate:

    .. math::
        L_{k+1} = \frac{\|\Delta g\|^2 / 2}
            {\langle g_{k+1}, \Delta x \rangle - \Delta f}, \qquad
        s_{k+1} = \min \Bigl\{ \frac{A_{k-1} + a_k}{A_k} s_k,
            \Bigl(\frac{A_k}{a_k^2} + \frac{2 a_{k+1}^2}{A_k}\Bigr)^{-1} \frac{1}{L_{k+1}} \Bigr\}

    with :math:`a_k = (k+3)^2 / (24 (k+14))`, :math:`A_k = a_{k+1} (k+3)/12`, :math:`A_{-1} = 0`.
    Then, with :math:`u = -s_k g_k` and :math:`\tau_k = (k+14)/12`, it steps by the kernel's rule

    .. math::
        m' = \frac{(\tau_k - 1) m + (a_k - 1) u}{\tau_{k+1}}, \qquad x_{k+1} = x_k + u + m'

    The guarantee for a convex loss is :math:`f(x_k) - f^* \le R^2 / (2 A_k s_k)`, where
    :math:`A_k \approx k^2/288` and R is the distance from :math:`x_0` to a minimizer. Params are x,
    so gradients are taken at the point that the guarantee is for. It is a whole optimizer: no
    learning rate before it, nothing after it, no prox.

    The first two calls measure the curvature at the start: the first makes a short trial step along
    the gradient and the second takes it back. The third call makes the step of k = 0.

    Near the minimum the denominator of L is lost in the rounding of f. Below 8 units of that
    rounding it is replaced by :math:`\langle \Delta g, \Delta x \rangle / 2`, which is the same for
    quadratics.

    Args:
      initial: learning rate of the trial step, above 0; None: :math:`10^{-3} |f| / \|g\|^2`, which
        has the right units, so that f may be multiplied by any number.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``; value must
        then be that of all devices.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``value``, but no ``value_fn``.
      It keeps two buffers, the momentum and the last gradient. Its state has ``learning_rate``.

    Raises:
      ValueError: if initial is not above 0; from init, if a parameter is neither floating-point nor
        complex; from update, if it is called without value.

    Example:
      Curvatures of any size, with one value and one gradient each step:

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

    def init(params: Params) -> AdaNAGState:
        scalar = lambda: jnp.zeros([], float)
        inner = cast(AccelerateState, kernel.init(params))
        return AdaNAGState(inner, wide_zeros(params), scalar(), scalar(), scalar())

    def update(
        updates: Updates,
        state: AdaNAGState,
        params: Params | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[Updates, AdaNAGState]:
        del params, extra_args
        if value is None:
            raise ValueError(
                "adanag needs the value of the loss: call optimizer.update(gradients, state, "
                "params, value=value)"
            )
        state = as_arrays(state)
        g, real, call = updates, state.learning_rate.dtype, state.inner.carry
        value = given_scalar("value", value).astype(real)
        dot = lambda a, b: inner_product(a, b, axis_name).astype(real)

        # The first pass over the arrays measures the curvature, the second makes the step.
        last = map_gradients(lambda g, last: last, g, state.gradient)
        rate = jnp.where(call == _BACK, 0, state.learning_rate)  # the trial step is m alone
        moved = map_gradients(lambda g, m: wide(m) - real_like(rate, g) * g, last, state.inner.m)
        measured = _curvature(g, last, moved, value, state.value, dot)
        curvature = jnp.where(
            call == _TRIAL, 0, jnp.where(call == _START, state.curvature, measured)
        )
        probe = _PROBE * guess(value, dot(g, g)) if initial is None else initial
        learning_rate = jnp.where(
            call == _TRIAL,
            jnp.asarray(probe, real),
            jnp.where(
                call == _START,
                state.learning_rate,
                _learning_rate(_index(call), state.learning_rate, curvature),
            ),
        )
        # With a 1 that XLA does not know. It would make a mere copy of g in a pass of its own.
        rate, one = jax.lax.optimization_barrier(jnp.stack([learning_rate, jnp.ones([], real)]))
        steps = map_gradients(lambda g: -real_like(rate, g) * wide(g), g)
        steps, inner = kernel.update(steps, state.inner)
        gradient = map_gradients(
            lambda g, old: (real_like(one, g) * wide(g)).astype(old.dtype), g, state.gradient
        )
        return map_gradients(lambda g, u: cast_like(u, g), updates, steps), AdaNAGState(
            inner=cast(AccelerateState, inner),
            gradient=filled(gradient, state.gradient),
            value=value,
            learning_rate=learning_rate,
            curvature=curvature,
        )

    return transformation(init, update)


def _index(call: jax.Array) -> jax.Array:
    """k: 0 in the first three calls, since the first two only measure the curvature."""
    return jnp.maximum(call - _START, 0)


def _rule() -> Rule:
    def step(call: jax.Array) -> tuple[jax.Array, Coefficients]:
        tau = lambda k: (k + 14) / 12
        k = _index(call).astype(float)
        beta, kappa = (tau(k) - 1) / tau(k + 1), (_a(k) - 1) / tau(k + 1)
        # trial: m' = u, update = m'; back: m' = -m, update = m'; then m counts as empty.
        phases = [call == _TRIAL, call == _BACK, call == _START]
        return jnp.asarray(optax.safe_increment(call)), Coefficients(
            beta=jnp.select(phases, [0.0, -1.0, 0.0], beta),
            kappa=jnp.select(phases, [1.0, 0.0, kappa], kappa),
            direct=jnp.where(call < _START, 0.0, 1.0),
            readout=0.0,
        )

    return Rule(first_step, step, at_params=True)


def _a(k: jax.Array) -> jax.Array:
    """a_k = (k + 3)^2 / (24 (k + 14))."""
    return (k + 3) ** 2 / (24 * (k + 14))


def _learning_rate(k: jax.Array, s: jax.Array, curvature: jax.Array) -> jax.Array:
    """s_k, from s_{k-1} and the curvature between the last two points; s_0 for k = 0."""
    i = jnp.maximum(k.astype(s.dtype) - 1, 0)
    a, after = _a(i), _a(i + 1)
    mass = after * (i + 3) / 12
    # A_{k-1} + a_k is a_k tau_k, except at the first k.
    grown = jnp.where(k > 1, a * (i + 14) / 12, a) / mass * s
    first = jnp.where(k == 0, _FIRST, 1 / (mass / a**2 + 2 * after**2 / mass))
    bound = ratio(first, curvature)
    unbounded = jnp.where(k == 0, s, grown)
    measured = (curvature > 0) & jnp.isfinite(curvature)
    limit = jnp.where(k == 0, bound, jnp.minimum(bound, grown))
    return within(jnp.where(measured, limit, unbounded))


def _curvature(
    g: Updates,
    last: Updates,
    moved: Updates,
    value: jax.Array,
    last_value: jax.Array,
    dot: Callable[[Updates, Updates], jax.Array],
) -> jax.Array:
    """L = |dg|^2 / (2 (<g, dx> - df)) between the last two points; 0 if it cannot be seen."""
    change = map_gradients(lambda g, last: wide(g) - last, g, last)
    eps = max((float(jnp.finfo(dtype_of(x)).eps) for x in jax.tree.leaves(g)), default=0.0)
    rounding = _ROUNDING * eps * jnp.maximum(jnp.abs(value), jnp.abs(last_value))
    bent = dot(g, moved) - (value - last_value)
    bent = jnp.where(bent < rounding, jnp.maximum(dot(change, moved) / 2, 0), bent)
    return ratio(dot(change, change) / 2, bent)
