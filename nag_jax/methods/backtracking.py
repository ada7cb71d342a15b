"""Step sizes that tune themselves from the values and gradients that the method sees anyway."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

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
from nag_jax._types import (
    ArrayLike,
    AxisName,
    Condition,
    Params,
    Prox,
    RestartLike,
    Scalar,
    Updates,
    transformation,
)
from nag_jax.kernel import shifted
from nag_jax.precision import storage
from nag_jax.restart import decision
from nag_jax.rules.rule import scalar

Dot: TypeAlias = Callable[[Updates, Updates], jax.Array]

_ROUNDING = 4  # of values, in units of the precision
_TELLING = 8  # a step this many times above rounding shows whether it was short enough


class BacktrackingState(NamedTuple):
    """State of :func:`backtracking`."""

    m: Params  # params - x, like params
    learning_rate: jax.Array  # to try next, shape=(), default float dtype; 0: none yet
    t: jax.Array  # FISTA's t, corrected for that learning rate, shape=(), default float dtype
    momentum: jax.Array  # m = momentum*(x_k - x_{k-1}), shape=(), default float dtype
    accepted: jax.Array  # steps taken, shape=(), int32
    retries: jax.Array  # calls that only shortened the step, shape=(), int32
    values: jax.Array  # calls of value_fn, shape=(), int32
    restart: decision.RestartState | tuple[()] = ()  # if there is a restart condition

    def iterate(self, params: Params) -> Params:
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
    restart: RestartLike = "gradient",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FISTA that finds its step size by growth and backtracking, with FISTA's guarantee.

    With :math:`u = -\epsilon g`, or the proximal step if there is a prox, each call tests

    .. math:: f(y + u) \le f(y) + \langle g, u \rangle + \frac{\|u\|^2}{2 \epsilon}

    If it holds, x moves to y + u and the learning rate grows. The momentum takes account of that:

    .. math::
        t'(t' - 1) \epsilon' = t^2 \epsilon, \qquad
        y' = x' + \frac{t - 1}{t'} (x' - x)

    If not, the learning rate shrinks. Since y depends on it, params move to the new y and the next
    gradient is taken there, while x stays. As long as no restart occurs,
    :math:`f(x_k) - f^* \le R^2 / (2 \epsilon_k t_k^2)`, where R is the distance from :math:`x_0`
    to a minimizer, without L being known.

    A call costs one gradient, which is given, and one more value. It costs more values, but no
    gradient, where there is no momentum and therefore y does not depend on the learning rate (in
    the first two calls and after a restart): there it doubles or halves the learning rate to the
    longest step that passes. A shorter step from the same y is also taken as long as
    :math:`\epsilon t^2` does not decrease by it. It is a whole optimizer: no learning rate before
    it, nothing after it. Differences of values below their rounding error, relative to f and to
    :math:`\sum |g_i y_i|`, do not change the learning rate.

    Args:
      prox: ``(tree, step) -> tree``, of a penalty or constraint that is added to the loss, from
        ``nag_jax.proximal``; None: none.
      initial: learning rate at which the first call starts its search, above 0. None:
        :math:`\sqrt 2 |f| / \|g\|^2`, which has the right units whatever those of f and params.
      grow: factor of the learning rate after each step, at least 1.
      grow_at_first: the same until a test has failed for the first time.
      shrink: factor after a failed test, in (0, 1).
      restart: "gradient", "value", "speed", None for never, or a condition from
        ``nag_jax.restart``. The number of restarts is ``optax.tree.get(state, "restarts")``.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``; value and
        value_fn must then be sums over the devices. Without axis_name, a value_fn with a ``psum``
        can make a device that searches for longer wait for the others forever.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``, ``value`` and
      ``value_fn``, as optax's line searches do; ``eval_params`` returns x. Its state has
      ``learning_rate``, ``t``, ``accepted``, ``retries`` and ``values``.

    Raises:
      ValueError: if an argument is out of range; from init, if a parameter is neither
        floating-point nor complex; from update, if something it needs is missing.

    Example:
      Curvatures of any size, and nothing to tune:

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
    condition = conditions.by_name(restart)

    def init(params: Params) -> BacktrackingState:
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
            restart=() if condition is None else decision.begin(),
        )

    def update(
        updates: Updates,
        state: BacktrackingState,
        params: Params | None = None,
        *,
        value: ArrayLike | None = None,
        value_fn: Callable[[Params], ArrayLike] | None = None,
        **extra_args: object,
    ) -> tuple[Updates, BacktrackingState]:
        del extra_args
        if params is None or value is None or value_fn is None:
            raise ValueError(
                "backtracking needs params, value and value_fn: call optimizer.update(gradients, "
                "state, params, value=value, grad=gradients, value_fn=loss)"
            )
        state = as_arrays(state)
        real = state.learning_rate.dtype
        dot = lambda a, b: inner_product(a, b, axis_name).astype(real)
        value = given_scalar("value", value).astype(real)
        seen = _seen(updates, params, trained(params, state.m), value, dot)

        # The longest step that passes, from the same y.
        first, still = state.learning_rate == 0, state.momentum == 0
        # In the middle of what doubling and halving leave open.
        begin = 2**0.5 * guess(value, seen.square) if initial is None else initial
        start = jnp.where(first, jnp.asarray(begin, real), state.learning_rate)
        # t_{k-1}^2 lr_{k-1}, 0 at first; y was made for this t unless there is no momentum.
        mass = state.t * (state.t - 1) * state.learning_rate
        t = _corrected(mass, start)
        lr, ok, telling, trials = search(
            _test(seen, value_fn, prox, dot),
            start,
            up=still,
            blind=first,
            floor=jnp.where(still, 0, start * (t - 1) / t),
            shrink=jnp.asarray(scalar(shrink), real),
        )
        t = jnp.where(still, _corrected(mass, lr), t)
        growth = jnp.where(state.retries == 0, scalar(grow_at_first), scalar(grow))
        factor = jnp.where(ok, jnp.where(telling, growth, 1), scalar(shrink)).astype(real)
        new_lr = within(lr * factor)

        memory = state.restart
        if condition is not None:
            u = _step(updates, seen.params, prox, lr)
            memory = cast(decision.RestartState, memory)
            memory, fire = _restart(condition, memory, u, state.m, ok, axis_name, value)
            # After a restart the step was the first one of a new run, from y.
            t = jnp.where(fire, 1, t)
        new_t = _corrected(jnp.where(ok, t * t * lr, mass), new_lr)
        scale, ahead = _extrapolation(ok, t, new_t)

        # As one array that XLA cannot take apart, so that it merges the kernels of small leaves.
        shared = jax.lax.optimization_barrier(jnp.stack([lr, scale, ahead, ok.astype(real)]))
        updates, m = _moves(updates, seen.params, state.m, prox, *shared)
        return updates, BacktrackingState(
            m=m,
            learning_rate=new_lr,
            t=new_t,
            momentum=jnp.where(ok, scale, state.momentum * scale),
            accepted=_added(state.accepted, ok),
            retries=_added(state.retries, ~ok),
            values=_added(state.values, trials),
            restart=memory,
        )

    return transformation(init, update)


class _Seen(NamedTuple):
    """What the test of a step needs; no derivative goes through it."""

    g: Updates
    params: Params  # with None where there is no buffer
    rest: Params  # all of params
    value: jax.Array  # f(y)
    square: jax.Array  # |g|^2
    rounding: jax.Array  # by how much a difference of values may be wrong


def _seen(g: Updates, rest: Params, params: Params, value: jax.Array, dot: Dot) -> _Seen:
    rounding = _ROUNDING * _rounding(value, g, params, dot)
    return _Seen(g, params, rest, value, dot(g, g), rounding)


def _test(
    seen: _Seen, value_fn: Callable[[Params], ArrayLike], prox: Prox | None, dot: Dot
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns ``test(lr)``: whether the step is short enough, and whether that can be told."""
    g, params, value, rounding = jax.lax.stop_gradient(
        (seen.g, seen.params, seen.value, seen.rounding)
    )

    def test(lr: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = _step(g, params, prox, lr)
        slope = dot(g, u)
        # |u|^2/(2 lr). A gradient step u = -lr*g needs no other sum.
        model = -slope / 2
        if prox is not None:
            model = dot(u, map_gradients(lambda u: u / real_like(2 * lr, u), u))
        after = value_fn(_moved(filled(params, seen.rest), u))
        after = given_scalar("what value_fn returns", after).astype(value.dtype)
        return _short_enough(after, value, slope, model, rounding)

    return test


def _short_enough(
    after: jax.Array, value: jax.Array, slope: jax.Array, model: jax.Array, rounding: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f(y + u) <= f(y) + <g, u> + |u|^2/(2 lr), and whether rounding lets that be told.

    ``model`` is the last term. Where it cannot be told, any step is short enough whose value is
    finite.
    """
    telling = model > _TELLING * rounding
    short = after <= value + slope + model + rounding
    return (short | ~telling) & jnp.isfinite(after), telling


def _restart(
    condition: Condition,
    state: decision.RestartState,
    u: Updates,
    m: Params,
    ok: jax.Array,
    axis_name: AxisName | None,
    value: jax.Array,
) -> tuple[decision.RestartState, jax.Array]:
    """The state of the restarts after this call, and whether it restarts; not without a step."""
    v = map_gradients(lambda u, m: mix(1.0, m, 1.0, u), u, m)
    fire, remembered = decision.ask(condition, state, u, v, axis_name, value)
    fire = fire & ok
    asked = decision.RestartState(
        restarts=_added(state.restarts, fire),
        steps=jnp.where(fire, 0, optax.safe_increment(state.steps)),
        remembered=remembered,
        phase=state.phase,
    )
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), asked, state), fire


def _extrapolation(ok: jax.Array, t: jax.Array, new_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``scale`` and ``ahead`` of m' = scale*(m + u), update = u + ahead*m', with u = 0 unless ok.

    After a step m' = (t - 1)/t' (x' - x). Without one m' is the same x - x_before for the new
    learning rate, m' = t/t' m, and the update is m' - m.
    """
    return jnp.where(ok, t - 1, t) / new_t, jnp.where(ok, 1, 1 - new_t / t)


def _moves(
    g: Updates,
    params: Params,
    m: Params,
    prox: Prox | None,
    lr: jax.Array,
    scale: jax.Array,
    ahead: jax.Array,
    ok: jax.Array,
) -> tuple[Updates, Params]:
    """The updates and the new buffer; see :func:`_extrapolation`."""
    taken = lambda u: jnp.where(ok > 0, u, jnp.zeros_like(u))
    u = jax.tree.map(taken, _step(g, params, prox, lr))
    new = filled(
        map_gradients(
            lambda u, m: (real_like(scale, m) * (wide(m) + wide(u))).astype(m.dtype), u, m
        ),
        m,
    )
    update = lambda g, u, m: cast_like(wide(u) + real_like(ahead, m) * wide(m), g)
    return map_gradients(update, g, u, new), new


def _step(g: Updates, params: Params, prox: Prox | None, lr: Scalar) -> Updates:
    """-lr*g, or the proximal step, in at least float32."""
    if prox is None:
        return map_gradients(lambda g: -real_like(lr, g) * wide(g), g)
    return proximal_step(prox, g, params, lr)


def _moved(params: Params, u: Updates) -> Params:
    move = lambda u, p: (wide(p) + wide(u)).astype(jnp.result_type(p))
    return filled(map_gradients(move, u, params), params)


def _added(count: jax.Array, more: jax.Array) -> jax.Array:
    """``count + more``, or ``count`` if that overflows."""
    return jnp.maximum(count + more.astype(count.dtype), count)


def _corrected(mass: jax.Array, lr: jax.Array) -> jax.Array:
    """The t of t (t - 1) lr = mass."""
    return (1 + jnp.sqrt(1 + 4 * mass / lr)) / 2


def _rounding(value: jax.Array, g: Updates, params: Params, dot: Dot) -> jax.Array:
    """How wrong a value may be: rounded itself, and computed from rounded params."""
    sizes = map_gradients(lambda g, p: jnp.abs(wide(p)), g, params)
    spread = dot(map_gradients(lambda g: jnp.abs(wide(g)), g), sizes)
    eps = [float(jnp.finfo(dtype_of(x)).eps) for x in jax.tree.leaves((g, params))]
    return max(eps, default=0.0) * (jnp.abs(value) + spread)
