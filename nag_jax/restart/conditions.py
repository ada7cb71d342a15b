"""The restart conditions."""

from typing import Any

from nag_jax._checks import as_static, check_count
from nag_jax.restart.decision import Condition, Seen


def by_name(condition: str | Condition | None) -> Condition | None:
    """The condition of that name; a condition itself, and None for never, as they are.

    Args:
      condition: "gradient", "value", "speed", a condition or None.

    Returns:
      A condition or None.

    Raises:
      ValueError: for anything else.

    >>> nag_jax.restart.by_name("speed") is nag_jax.restart.speed
    True
    """
    if condition is None or callable(condition):
        return condition
    named = {"gradient": gradient, "value": value, "speed": speed}
    if not isinstance(condition, str) or condition not in named:
        raise ValueError(
            "restart must be one of 'gradient', 'value', 'speed', a condition such as "
            f"nag_jax.restart.every(100), or None for never, got {condition!r}; "
            f"{as_static('restart')}"
        )
    return named[condition]


def gradient(seen: Seen) -> tuple[Any, Any]:
    r"""Restarts where the step opposes the momentum: :math:`\langle u, x_{k+1} - x_k \rangle < 0`.

    The best general choice: no evaluation and nothing to remember. With ``prox_step`` u is the
    negative generalized gradient. On mini-batches it fires at random: use ``rules.srsgd`` there.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.gradient)

    References:
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012,
      arXiv:1204.3982, section 3.2.
    """
    _check_seen(seen)
    return seen.dot(seen.u, seen.v) < 0, seen.remembered


def value(seen: Seen) -> tuple[Any, Any]:
    """Restarts where the loss at params has grown; update needs ``value=loss`` for that.

    Near the minimum differences of values drown in rounding where :func:`gradient` still works.
    Inside ``shard_map`` or ``pmap`` name the axes of devices that each have a loss of their own in
    ``accelerate(..., axis_name=...)``: all decide by the mean then, and without it each for itself.

    Raises:
      ValueError: from update, if it is called without ``value``.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.value)

    References:
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012,
      arXiv:1204.3982, section 3.1 (there at x, one more evaluation).
    """
    _check_seen(seen)
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
    _check_seen(seen)
    now = seen.dot(seen.v, seen.v)
    return (seen.steps >= 10) & (now < seen.remembered), now


def every(n: int) -> Condition:
    r"""Restarts every n steps; :math:`n = e \sqrt{8/q}` is the best for known q = mu/L.

    Args:
      n: steps from one restart to the next, at least 1.

    Returns:
      A condition.

    Raises:
      ValueError: if n is below 1.

    >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.every(100))
    """
    check_count("n", n)

    def condition(seen: Seen) -> tuple[Any, Any]:
        _check_seen(seen)
        # The step after the decision restarts, and is one of the n.
        return seen.steps + 2 >= n, seen.remembered

    return condition


def _check_seen(seen: Any) -> None:
    """Raises ValueError where ``inject_hyperparams`` calls a condition as if it were a schedule."""
    if not isinstance(seen, Seen):
        raise ValueError(
            f"a restart condition was called with {seen!r} instead of a restart.Seen; "
            f"{as_static('restart')}, or give its name"
        )
