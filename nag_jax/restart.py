"""Restart conditions for ``accelerate(rule, restart=...)``: when momentum is better forgotten.

Without known strong convexity, momentum that tends to 1 overshoots and oscillates. A restart
empties the buffer (the next params are params + u) and starts the rule's scalars anew, which on
well-behaved problems gives the linear rate of the best constant momentum to within a constant.

A condition is a function ``seen -> (fire, remembered)`` of what :class:`Seen` holds, the second a
number that it sees again at the next step. A new one is one more function; none needs a buffer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import map_gradients, wide
from nag_jax._checks import check_range
from nag_jax._rule import Coefficients


class Seen(NamedTuple):
    """What a condition may look at: x is the iterate, u the step that the chain proposes."""

    steps: jax.Array  # since the last restart, int32 []
    remembered: jax.Array  # what the condition returned last, float []; 0 at first
    u: Any  # like params
    v: Any  # x_{k+1} - x_k = m + u, like params
    dot: Callable[[Any, Any], jax.Array]  # real inner product over all leaves and devices
    value: Any  # of the loss at params, if update was called with value=


class RestartState(NamedTuple):
    """What a restart condition adds to the state of ``accelerate``."""

    restarts: jax.Array  # how often it fired, shape=(), int32
    steps: jax.Array  # since the last restart, shape=(), int32
    remembered: jax.Array  # shape=(), default float dtype


Condition = Callable[[Seen], tuple[Any, Any]]


def gradient(seen: Seen) -> tuple[Any, Any]:
    r"""Restarts where the step opposes the momentum: :math:`\langle u, x_{k+1} - x_k \rangle < 0`.

    The best general choice: no evaluation and nothing to remember. With ``prox_step`` u is the
    negative generalized gradient. On mini-batches it fires at random: use ``rules.srsgd`` there.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.gradient)

    References:
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012,
      arXiv:1204.3982, section 3.2.
    """
    return seen.dot(seen.u, seen.v) < 0, seen.remembered


def value(seen: Seen) -> tuple[Any, Any]:
    """Restarts where the loss at params has grown; update needs ``value=loss`` for that.

    Near the minimum differences of values drown in rounding where :func:`gradient` still works.

    Raises:
      ValueError: from update, if it is called without ``value``.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.value)

    References:
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012,
      arXiv:1204.3982, section 3.1 (there at x, one more evaluation).
    """
    if seen.value is None:
        raise ValueError(
            "restart.value needs the loss at params, got none; call "
            "optimizer.update(gradients, state, params, value=loss), or use restart.gradient"
        )
    return (seen.steps > 0) & (seen.value > seen.remembered), seen.value


def speed(seen: Seen) -> tuple[Any, Any]:
    r"""Restarts where :math:`\|x_{k+1} - x_k\|` shrinks, not before 10 steps after the last one.

    Slower than :func:`gradient` on quadratics, and the one with a proof of linear convergence in
    continuous time.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.speed)

    References:
      Su, Boyd, Candes, A differential equation for modeling Nesterov's accelerated gradient
      method, 2015, arXiv:1503.01243, section 5.
    """
    now = seen.dot(seen.v, seen.v)
    return (seen.steps >= 10) & (now < seen.remembered), now


def every(n: int) -> Condition:
    r"""Restarts every n steps; :math:`n = e \sqrt{8/q}` is the best for known q = mu/L.

    Args:
      n: at least 1.

    Returns:
      A condition.

    Raises:
      ValueError: if n is below 1.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.every(100))
    """
    check_range("n", n, 1)
    return lambda seen: (seen.steps + 1 >= n, seen.remembered)


def start() -> RestartState:
    """The state before the first step."""
    zero = lambda dtype: jnp.zeros([], dtype)  # one buffer each, so that all can be donated
    return RestartState(restarts=zero(jnp.int32), steps=zero(jnp.int32), remembered=zero(float))


def decide(
    condition: Condition, state: Any, u: Any, m: Any, axis_name: Any, loss: Any
) -> tuple[jax.Array, RestartState]:
    """Whether to restart now, and the state after that."""
    v = map_gradients(lambda u, m: wide(m) + wide(u), u, m)
    dot = lambda a, b: _inner_product(a, b, axis_name)
    fire, remembered = condition(Seen(state.steps, state.remembered, u, v, dot, loss))
    return jnp.asarray(fire), RestartState(
        restarts=state.restarts + jnp.asarray(fire, jnp.int32),
        steps=jnp.where(fire, 0, state.steps + 1),
        remembered=jnp.asarray(remembered, state.remembered.dtype),
    )


def check(condition: Any) -> None:
    """Raises ValueError if ``condition`` is neither None nor a function."""
    if condition is not None and not callable(condition):
        raise ValueError(
            "restart must be None or a condition such as nag_jax.restart.gradient, got "
            f"{condition!r}"
        )


def check_rule(c: Coefficients) -> None:
    """Raises ValueError for a rule that a restart would not bring back to the gradient step."""
    for scalar in (c.direct, c.lookahead):
        if not isinstance(scalar, int | float) or scalar != 1:
            raise ValueError(
                "restart needs a rule with update = u + m', got direct="
                f"{c.direct}, lookahead={c.lookahead}; use rules.fista(), nesterov(), ogm(), ..."
            )


def _inner_product(a: Any, b: Any, axis_name: Any) -> jax.Array:
    """Real part of <a, b> over all leaves, and over the devices of ``axis_name``, in float32."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    terms = [jnp.sum((jnp.conj(wide(x)) * wide(y)).real) for x, y in pairs]
    axes = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    # A leaf that all devices hold in full counts once, where shard_map tells which those are.
    varying = [frozenset(getattr(jax.typeof(x), "vma", ())) & set(axes) for x in terms]
    total = jnp.zeros([], float)
    for term, vary in zip(terms, varying, strict=True):
        over = tuple(vary) if any(varying) else axes
        total = total + (jax.lax.psum(term, over) if over else term)
    return total
