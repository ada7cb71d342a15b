"""The restart conditions."""

from nag_jax._checks import as_static, check_count
from nag_jax._types import ArrayLike, RestartLike
from nag_jax.restart.decision import Condition, Seen


def by_name(condition: RestartLike) -> Condition | None:
    """Returns the condition with the given name.

    Args:
      condition: "gradient", "value" or "speed"; or a condition or None, for never, which are
        returned unchanged.

    Returns:
      A condition or None.

    Raises:
      ValueError: for anything else, also for ``every`` without its number of steps.

    Example:
      >>> nag_jax.restart.by_name("speed") is nag_jax.restart.speed
      True
    """
    if condition is every:
        raise ValueError("restart got restart.every itself; call it, as in restart.every(100)")
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


def gradient(seen: Seen) -> tuple[ArrayLike, ArrayLike]:
    r"""Restarts if the step opposes the momentum: :math:`\langle u, x_{k+1} - x_k \rangle < 0`.

    This is the best general choice, since it needs no function value. With ``prox_step``, u is the
    negative generalized gradient. On mini-batches it would restart at random; use ``rules.srsgd``
    for them.

    Args:
      seen: the step, the movement of the iterate and what was remembered.

    Returns:
      Whether to restart, and what to remember.

    Example:
      >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.gradient)

    References:
      O'Donoghue, Candes, Adaptive restart for accelerated gradient schemes, 2012,
      arXiv:1204.3982, section 3.2.
    """
    _check_seen(seen)
    return seen.dot(seen.u, seen.v) < 0, seen.remembered


def value(seen: Seen) -> tuple[ArrayLike, ArrayLike]:
    """Restarts if the loss at params has increased, for which update needs ``value=loss``.

    Near the minimum, differences of values are lost to rounding, where :func:`gradient` still
    works. Inside ``shard_map`` or ``pmap``, if devices have different values of the loss, name
    their axes in ``accelerate(..., axis_name=...)``. All devices then decide by the mean; without
    it each device decides by its own value.

    Args:
      seen: the loss and what was remembered, the loss at the step before.

    Returns:
      Whether to restart, and what to remember.

    Raises:
      ValueError: from update, if it is called without ``value``.

    Example:
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


def speed(seen: Seen) -> tuple[ArrayLike, ArrayLike]:
    r"""Restarts if :math:`\|x_{k+1} - x_k\|` decreases, at least 10 steps after the last restart.

    It is slower than :func:`gradient` on quadratics, but has a proof of linear convergence in
    continuous time.

    Args:
      seen: the movement of the iterate and what was remembered, its squared norm the step before.

    Returns:
      Whether to restart, and what to remember.

    Example:
      >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.speed)

    References:
      Su, Boyd, Candes, A differential equation for modeling Nesterov's accelerated gradient
      method, 2015, arXiv:1503.01243, section 5.
    """
    _check_seen(seen)
    now = seen.dot(seen.v, seen.v)
    return (seen.steps >= 10) & (now < seen.remembered), now


def every(n: int) -> Condition:
    r"""Returns a condition that restarts every n steps.

    For known q = mu/L, the best choice is :math:`n = e \sqrt{8/q}`.

    Args:
      n: steps from one restart to the next, at least 1.

    Returns:
      A condition.

    Raises:
      ValueError: if n is below 1.

    Example:
      >>> kernel = nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.every(100))
    """
    check_count("n", n)

    def condition(seen: Seen) -> tuple[ArrayLike, ArrayLike]:
        _check_seen(seen)
        # The restart is in the step after the decision, which counts as one of the n.
        return seen.steps + 2 >= n, seen.remembered

    return condition


def _check_seen(seen: object) -> None:
    """Raises ValueError if ``inject_hyperparams`` has called a condition as a schedule."""
    if not isinstance(seen, Seen):
        raise ValueError(
            f"a restart condition was called with {seen!r} instead of a restart.Seen; "
            f"{as_static('restart')}, or give its name"
        )
