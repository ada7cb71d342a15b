"""Momentum schedules: functions from the integer step to the momentum.

``momentum(t)`` is for the point where gradient number t is taken, t = 0, 1, ... With
``rules.nesterov`` that point is ``y_t = x_t + momentum(t) * (x_t - x_{t-1})``.
"""

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._checks import check_count, check_range
from nag_jax._types import ArrayLike, Scalar
from nag_jax.rules.rule import at_step, check_conditioning, scalar


def sutskever(
    max_momentum: float = 0.99,
    *,
    period: int = 250,
    total_steps: int | None = None,
    final_steps: int = 1000,
    final_momentum: float = 0.9,
) -> optax.Schedule:
    r"""Returns the schedule of Sutskever et al. 2013, section 3, which grows in stages.

    .. math:: \mu_t = \min(1 - 2^{-1 - \log_2(\lfloor t/250 \rfloor + 1)}, \mu_{\max})

    The values are 1/2, 3/4, 5/6, 7/8, ... for 250 steps each. The paper ends training with
    :math:`\mu = 0.9` for the last 1000 updates, at an unchanged learning rate.

    Args:
      max_momentum: :math:`\mu_{\max}`, in [0, 1). The paper uses 0, 0.9, 0.99, 0.995, 0.999.
      period: number of steps with the same value, at least 1; 250 in the equation.
      total_steps: length of training in steps, at least 0; None: no final phase.
      final_steps: length of the final phase in steps, at least 0.
      final_momentum: momentum of the final phase, in [0, 1), if it is below that of the equation.

    Returns:
      A schedule step -> momentum.

    Raises:
      ValueError: for momenta outside [0, 1), a period below 1, or a final phase that is not
        shorter than the training.

    Example:
      >>> momentum = nag_jax.schedules.sutskever(0.99, total_steps=5000)
      >>> [round(float(momentum(t)), 3) for t in (0, 250, 500, 3999, 4000)]
      [0.5, 0.75, 0.833, 0.969, 0.9]

    References:
      Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
      learning, ICML 2013, equation 5.
    """
    check_range("max_momentum", max_momentum, 0.0, 1.0)
    check_range("final_momentum", final_momentum, 0.0, 1.0)
    check_count("period", period)
    check_range("final_steps", final_steps, 0)
    if total_steps is not None:
        check_range("total_steps", total_steps, 0)
    traced = any(isinstance(steps, Tracer) for steps in (total_steps, final_steps))
    if total_steps is not None and not traced and not total_steps > final_steps:
        raise ValueError(
            f"total_steps={total_steps!r} must be more than final_steps={final_steps}, the length "
            "of the final phase; pass a smaller final_steps"
        )

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        periods = jnp.asarray(step // period, float)
        momentum = jnp.minimum(1 - 0.5 / (periods + 1), scalar(max_momentum))
        if total_steps is None:
            return momentum
        final = jnp.minimum(momentum, scalar(final_momentum))
        return jnp.where(step >= total_steps - final_steps, final, momentum)

    return schedule


def convex(a: float = 2.0) -> optax.Schedule:
    r"""Returns Nesterov's momentum for convex functions, which tends to 1.

    .. math:: \mu_t = \frac{k}{k + 1 + a}, \quad k = t - 1

    With step size 1/L and a = 2, :math:`f(x_t) - f^* \le 2 L R^2 / (k^2 + 5k + 6)` after
    k + 1 = t steps, which is attained (:doc:`the table of proofs </proved>`). The iterates
    converge, too, which was proved for a = 2 in 2025 (arXiv:2510.23513, arXiv:2510.22715).

    Args:
      a: how fast the momentum grows, at least 2; larger is slower.

    Returns:
      A schedule step -> momentum; 0 at the steps 0 and 1, where there is no velocity yet.

    Raises:
      ValueError: if a is below 2.

    Example:
      >>> [round(float(nag_jax.schedules.convex()(t)), 3) for t in (1, 2, 3, 100)]
      [0.0, 0.25, 0.4, 0.971]

    References:
      Chambolle, Dossal, On the convergence of the iterates of the FISTA, JOTA 166, 2015.
      Taylor, Hendrickx, Glineur, Smooth strongly convex interpolation and exact worst-case
      performance of first-order methods, 2016, arXiv:1512.07516.
    """
    check_range("a", a, 2.0)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        k = jnp.asarray(jnp.maximum(step - 1, 0), float)
        return k / (k + (1 + scalar(a)))

    return schedule


def strongly_convex(q: Scalar) -> optax.Schedule:
    r"""Returns the constant momentum of ``rules.strongly_convex`` as a schedule.

    .. math:: \mu_t = \frac{1 - \sqrt q}{1 + \sqrt q}

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1].

    Returns:
      A schedule step -> momentum.

    Raises:
      ValueError: if q is outside (0, 1].

    Example:
      >>> round(nag_jax.schedules.strongly_convex(1e-4)(0), 4)
      0.9802

    References:
      Nesterov, Introductory Lectures on Convex Optimization, 2004, section 2.2.
    """
    root = check_conditioning(q) ** 0.5
    return optax.constant_schedule((1 - root) / (1 + root))


def linear(
    momentum: float,
    *,
    initial: float = 0.5,
    warmup_steps: int = 0,
    final: float = 0.0,
    cooldown_steps: int = 0,
    total_steps: int | None = None,
) -> optax.Schedule:
    """Returns a linear warm-up to ``momentum``, a plateau, and a linear cool-down to ``final``.

    Args:
      momentum: momentum of the plateau, in [0, 1).
      initial: momentum at step 0, in [0, 1), if there is a warm-up.
      warmup_steps: length of the warm-up in steps, at least 0; 0: no warm-up.
      final: momentum from step ``total_steps``, in [0, 1), if there is a cool-down.
      cooldown_steps: length of the cool-down in steps, at least 0; 0: no cool-down.
      total_steps: the step at which the cool-down ends. None: there is no cool-down.

    Returns:
      A schedule step -> momentum.

    Raises:
      ValueError: for momenta outside [0, 1), or lengths that are negative, traced or do not fit
        into total_steps.

    Example:
      >>> momentum = nag_jax.schedules.linear(
      ...     0.9, initial=0.5, warmup_steps=100, final=0.5, cooldown_steps=100, total_steps=1000)
      >>> [round(float(momentum(t)), 2) for t in (0, 50, 100, 900, 950, 1000)]
      [0.5, 0.7, 0.9, 0.9, 0.7, 0.5]
    """
    for name, value in (("momentum", momentum), ("initial", initial), ("final", final)):
        check_range(name, value, 0.0, 1.0)
    end = 0 if total_steps is None else total_steps
    for name, value in (
        ("warmup_steps", warmup_steps), ("cooldown_steps", cooldown_steps), ("total_steps", end)
    ):  # fmt: skip
        check_range(name, value, 0, static=True)
    if cooldown_steps and total_steps is None:
        raise ValueError(f"cooldown_steps={cooldown_steps} needs total_steps, where it ends")
    end = warmup_steps + cooldown_steps if total_steps is None else total_steps
    if end < warmup_steps + cooldown_steps:
        raise ValueError(
            f"total_steps={total_steps} is shorter than warmup_steps + cooldown_steps = "
            f"{warmup_steps + cooldown_steps}"
        )
    up = optax.constant_schedule(momentum)
    if warmup_steps:
        up = optax.linear_schedule(initial, momentum, warmup_steps)
    if not cooldown_steps:
        return up
    down = optax.linear_schedule(momentum, final, cooldown_steps)
    return optax.join_schedules([up, down], [end - cooldown_steps])


def follow_learning_rate(
    peak: float, learning_rate: optax.ScalarOrSchedule, *, start: int, end: int
) -> optax.Schedule:
    r"""Returns a schedule that follows the learning rate in a window of steps, and is 0 elsewhere.

    .. math:: b_t = b_{\max} \frac{\epsilon_t}{\max_r \epsilon_r}
        \text{ for start} \le t < \text{end}

    This is how the authors of ``rules.ema_nesterov`` schedule the look-ahead: no look-ahead in the
    first part of training, where updates change direction, and in the last, where the learning rate
    falls. In their speed-runs they use peaks of 0.3 to 0.6, a start at 10 to 16 % of the steps, and
    an end at 67 to 77 %.

    Args:
      peak: the value where the learning rate is largest, in [0, 1).
      learning_rate: :math:`\epsilon`, the same as in the chain, a number or a schedule of the
        integer step. It is evaluated here at all steps before ``end`` to find its largest value.
      start: the first step of the window, at least 0.
      end: the first step after the window, above start.

    Returns:
      A schedule step -> value in [0, peak].

    Raises:
      ValueError: for a peak outside [0, 1), a window that does not end after it starts, or a
        learning rate that is not above 0 at any step before ``end``.

    Example:
      >>> rate = optax.linear_schedule(0.1, 0.0, 1000)
      >>> ahead = nag_jax.schedules.follow_learning_rate(0.6, rate, start=150, end=750)
      >>> [round(float(ahead(t)), 3) for t in (0, 149, 150, 500, 749, 750)]
      [0.0, 0.0, 0.51, 0.3, 0.151, 0.0]

    References:
      Yau, Li, Glentis, Boreiko, Wai, Hong, EMA-Nesterov: stabilizing Nesterov's lookahead for
      accelerated deep learning optimization, 2026, arXiv:2605.25395.
    """
    check_range("peak", peak, 0.0, 1.0)
    check_range("learning_rate", learning_rate, 0.0, low_open=True, schedule=True)
    check_count("start", start, 0, static=True)
    check_count("end", end, static=True)
    if end <= start:
        raise ValueError(
            f"end={end} must be above start={start}: the window has the steps from start to end - 1"
        )
    rate_at = lambda step: jnp.asarray(at_step(learning_rate, step), float)
    with jax.ensure_compile_time_eval():  # once, even if this is called inside jit
        largest = jnp.max(jax.vmap(rate_at)(jnp.arange(end)))
        largest = largest if isinstance(largest, Tracer) else float(largest)
    if isinstance(largest, float) and not largest > 0:
        raise ValueError(
            f"learning_rate must be above 0 at a step before end={end}, got at most {largest:g}"
        )

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        inside = (start <= step) & (step < end)
        return jnp.where(inside, scalar(peak) * rate_at(step) / largest, 0.0)

    return schedule
