"""Step sizes that tune themselves from the values and gradients that the method sees anyway."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax import restart as conditions
from nag_jax._arithmetic import (
    as_arrays,
    cast_like,
    dtype_of,
    filled,
    map_gradients,
    mix,
    proximal_step,
    real_like,
    trained,
    wide,
)
from nag_jax._checks import check_prox, check_range, given_scalar
from nag_jax._paths import only_scalar
from nag_jax._reductions import inner_product
from nag_jax._step_size import guess, search, within
from nag_jax.kernel import shifted
from nag_jax.precision import storage
from nag_jax.proximal import Prox
from nag_jax.restart import decision
from nag_jax.rules.rule import scalar

_ROUNDING = 4  # of values, in units of the precision
_TELLING = 8  # a step this many times above rounding tells whether it was short enough


class BacktrackingState(NamedTuple):
    """State of :func:`backtracking`."""

    m: optax.Updates  # params - x, like params
    learning_rate: jax.Array  # to try next, shape=(), default float dtype; 0: none yet
    t: jax.Array  # FISTA's t, corrected for that learning rate, shape=(), default float dtype
    momentum: jax.Array  # m = momentum*(x_k - x_{k-1}), shape=(), default float dtype
    accepted: jax.Array  # steps taken, shape=(), int32
    retries: jax.Array  # calls that only shortened the step, shape=(), int32
    values: jax.Array  # calls of value_fn, shape=(), int32
    restart: Any = ()  # RestartState if there is a restart condition

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns x, for :func:`eval_params`."""
        only_scalar(self.t)
        return shifted(params, self.m, -1.0)


def backtracking(
    prox: Prox | None = None,
    *,
    initial: float | None = None,
    grow: float = 1.05,
    grow_at_first: float = 1.25,
    shrink: float = 0.5,
    restart: Any = "gradient",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FISTA that finds its step size: it grows, backtracks, and keeps FISTA's guarantee.

    With :math:`u = -\epsilon g`, or the step of ``prox_step``, each call tests

    .. math:: f(y + u) \le f(y) + \langle g, u \rangle + \frac{\|u\|^2}{2 \epsilon}

    If it holds, x moves to y + u and the learning rate grows; the momentum takes account of that,

    .. math::
        t'(t' - 1) \epsilon' = t^2 \epsilon, \qquad
        y' = x' + \frac{t - 1}{t'} (x' - x)

    If not, the learning rate shrinks, and since y depends on it, params move to the new y and the
    next gradient is taken there; x stays. So, as long as no restart fires,
    :math:`f(x_k) - f^* \le R^2 / (2 \epsilon_k t_k^2)` without L being known.

    A call costs one gradient, given, and one value more. It costs more values, but no gradient,
    where there is no momentum, so that y does not depend on the learning rate (the first two calls
    and after a restart): there it doubles and halves to the longest step that passes. A shorter
    step from the same y is also taken while :math:`\epsilon t^2` gets no smaller by it. It is a
    whole optimizer: no learning rate before it, nothing after it. Differences of values that
    rounding hides, relative to f and to :math:`\sum |g_i y_i|`, change no learning rate.

    Args:
      prox: ``(tree, step) -> tree``, of a penalty or constraint that is added to the loss, from
        ``nag_jax.proximal``; None: none.
      initial: where the first call starts its search for a learning rate, above 0. None:
        :math:`\sqrt 2 |f| / \|g\|^2`, which has the right units, so that it makes no difference
        which ones f and params have.
      grow: factor of the learning rate after each step, at least 1.
      grow_at_first: the same until a test has failed for the first time.
      shrink: factor after a failed test, in (0, 1).
      restart: "gradient", "value", "speed", None for never, or a condition from
        ``nag_jax.restart``; how often it fired is ``optax.tree.get(state, "restarts")``.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``; value and
        value_fn have to be sums over the devices then, and without axis_name a value_fn with a
        ``psum`` makes devices that search for longer wait for the others for ever.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``, ``value`` and
      ``value_fn``, as optax's line searches do; ``eval_params`` finds x. In its state are
      ``learning_rate``, ``t``, ``accepted``, ``retries`` and ``values``.

    Raises:
      ValueError: for arguments out of range; from init, if a parameter is neither floating-point
        nor complex; from update, if something it needs is missing.

    The point: curvatures of any size, and nothing to tune.

    >>> optimizer = nag_jax.backtracking()
    >>> @jax.jit
    ... def step(params, state, scale):
    ...     loss = lambda p: scale * jnp.sum(jnp.array([1.0, 0.01]) * (p - 1) ** 2)
    ...     value, gradient = jax.value_and_grad(loss)(params)
    ...     updates, state = optimizer.update(
    ...         gradient, state, params, value=value, grad=gradient, value_fn=loss)
    ...     return optax.apply_updates(params, updates), state
    >>> for scale in (1e-6, 1.0, 1e6):
    ...     params = jnp.zeros(2)
    ...     state = optimizer.init(params)
    ...     for _ in range(200):
    ...         params, state = step(params, state, scale)
    ...     print([f"{x:.2f}" for x in nag_jax.eval_params(params, state)])
    ['1.00', '1.00']
    ['1.00', '1.00']
    ['1.00', '1.00']

    References:
      Scheinberg, Goldfarb, Bai, Fast first-order methods for composite convex optimization with
      backtracking, Foundations of Computational Mathematics 14, 2014. Beck, Teboulle, A fast
      iterative shrinkage-thresholding algorithm for linear inverse problems, 2009, section 4.
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012, arXiv:1204.3982.
    """
    if prox is not None:
        check_prox(prox)
    if initial is not None:
        check_range("initial", initial, 0.0, low_open=True)
    check_range("grow", grow, 1.0)
    check_range("grow_at_first", grow_at_first, 1.0)
    check_range("shrink", shrink, 0.0, 1.0, low_open=True)
    restart = conditions.by_name(restart)

    def init(params: optax.Params) -> BacktrackingState:
        scalar = lambda x: jnp.full([], x, float)
        count = lambda: jnp.zeros([], jnp.int32)
        return BacktrackingState(
            m=storage.zeros(params),
            learning_rate=scalar(0),
            t=scalar(1),
            momentum=scalar(0),
            accepted=count(),
            retries=count(),
            values=count(),
            restart=() if restart is None else decision.begin(),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BacktrackingState]:
        del extra_args
        if params is None or value is None or value_fn is None:
            raise ValueError(
                "backtracking needs params, value and value_fn: call optimizer.update(gradients, "
                "state, params, value=value, grad=gradients, value_fn=loss)"
            )
        state = as_arrays(state)
        g, carry = updates, state
        real = carry.learning_rate.dtype
        at_first, later, shorter = (
            jnp.asarray(scalar(factor), real) for factor in (grow_at_first, grow, shrink)
        )
        dot = lambda a, b: inner_product(a, b, axis_name).astype(real)
        value = given_scalar("value", value).astype(real)
        rounding = _ROUNDING * _rounding(value, g, trained(params, state.m), dot)

        constants = jax.lax.stop_gradient((g, trained(params, state.m), value, rounding))

        def test(lr: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Whether the step is short enough, and whether that can be told at all."""
            g, tuned, value, rounding = constants
            u = _step(g, tuned, prox, lr)
            model = dot(u, map_gradients(lambda u: u / real_like(2 * lr, u), u))
            after = value_fn(_moved(filled(tuned, params), u))
            after = given_scalar("what value_fn returns", after).astype(real)
            telling = model > _TELLING * rounding
            short = after <= value + dot(g, u) + model + rounding
            return (short | ~telling) & jnp.isfinite(after), telling

        first, still = carry.learning_rate == 0, carry.momentum == 0
        begin = jnp.full_like(value, 0 if initial is None else initial)
        if initial is None:
            # In the middle of what doubling and halving leave open.
            begin = 2**0.5 * guess(value, dot(g, g))
        start = jnp.where(first, begin, carry.learning_rate)
        # mass is t_{k-1}^2 lr_{k-1}, 0 at first; y was made for this t unless there is no momentum.
        mass = carry.t * (carry.t - 1) * carry.learning_rate
        t = _corrected(mass, start)
        floor = jnp.where(still, 0, start * (t - 1) / t)
        lr, ok, telling, n = search(test, start, up=still, blind=first, floor=floor, shrink=shorter)
        u = _step(g, params, prox, lr)
        t = jnp.where(still, _corrected(mass, lr), t)

        factor = jnp.where(carry.retries == 0, at_first, later)
        new_lr = within(lr * jnp.where(ok, jnp.where(telling, factor, 1), shorter))
        fire, memory = jnp.asarray(False), state.restart
        if restart is not None:
            v = map_gradients(lambda u, m: mix(1.0, m, 1.0, u), u, state.m)
            fire, remembered = decision.ask(restart, memory, u, v, axis_name, value)
            fire = fire & ok
            asked = decision.RestartState(
                restarts=_added(memory.restarts, fire),
                steps=jnp.where(fire, 0, optax.safe_increment(memory.steps)),
                remembered=remembered,
                phase=memory.phase,
            )
            memory = jax.tree.map(lambda a, b: jnp.where(ok, a, b), asked, memory)
        # After a restart the step was the first one of a new run, from y.
        t = jnp.where(fire, 1, t)
        new_t = _corrected(jnp.where(ok, t * t * lr, mass), new_lr)
        # m' = scale*(m + u) after a step; without one the same x - x_before, for the new lr.
        scale = jnp.where(ok, t - 1, t) / new_t
        m = map_gradients(
            lambda u, m: (
                real_like(scale, m) * (wide(m) + jnp.where(ok, wide(u), jnp.zeros_like(wide(u))))
            ).astype(m.dtype),
            u,
            state.m,
        )
        m = filled(m, state.m)
        # Without a step m' - m, which is (1 - new_t/t) m'.
        ahead = jnp.where(ok, 1, 1 - new_t / t)
        updates = map_gradients(
            lambda g, u, m: cast_like(
                jnp.where(ok, wide(u), jnp.zeros_like(wide(u))) + real_like(ahead, m) * wide(m), g
            ),
            g,
            u,
            m,
        )
        return updates, BacktrackingState(
            m=m,
            learning_rate=new_lr,
            t=new_t,
            momentum=jnp.where(ok, scale, carry.momentum * scale),
            accepted=_added(carry.accepted, ok),
            retries=_added(carry.retries, ~ok),
            values=_added(carry.values, n),
            restart=memory,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _step(g: Any, params: Any, prox: Any, lr: Any) -> Any:
    """-lr*g, or the proximal step, in float32 at least."""
    if prox is None:
        return map_gradients(lambda g: -real_like(lr, g) * wide(g), g)
    return proximal_step(prox, g, params, lr)


def _moved(params: Any, u: Any) -> Any:
    move = lambda u, p: (wide(p) + wide(u)).astype(jnp.result_type(p))
    return filled(map_gradients(move, u, params), params)


def _added(count: jax.Array, more: jax.Array) -> jax.Array:
    """``count + more``, or ``count`` where that would overflow."""
    return jnp.maximum(count + more.astype(count.dtype), count)


def _corrected(mass: jax.Array, lr: jax.Array) -> jax.Array:
    return (1 + jnp.sqrt(1 + 4 * mass / lr)) / 2


def _rounding(value: jax.Array, g: Any, params: Any, dot: Any) -> jax.Array:
    """How far off a value may be: rounded itself, and computed from rounded params."""
    sizes = map_gradients(lambda g, p: jnp.abs(wide(p)), g, params)
    spread = dot(map_gradients(lambda g: jnp.abs(wide(g)), g), sizes)
    eps = [float(jnp.finfo(dtype_of(x)).eps) for x in jax.tree.leaves((g, params))]
    return max(eps, default=0.0) * (jnp.abs(value) + spread)
