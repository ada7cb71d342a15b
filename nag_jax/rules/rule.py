"""What a rule is: a few scalars a step, and the checks that rules share.

A rule is a pair ``(init, step)`` on scalars. ``init()`` gives the carry (a step count, FISTA's
``t``, ...) and ``step(carry)`` the next carry and the step's ``Coefficients``. With ``u`` the
additive step that arrives at the kernel and ``m`` its one buffer, the coefficients mean

    m'     = beta*m + kappa*u
    update = direct*u + lookahead*m'
    x_eval = params + readout*m'

A constant coefficient is a Python float, so that it costs nothing on the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._checks import check_count, check_range

Scalar = float | jax.Array


class Coefficients(NamedTuple):
    """The scalars of one step of the kernel (see the module's docstring)."""

    beta: Scalar  # decay of the buffer
    kappa: Scalar  # weight of the new step in the buffer
    direct: Scalar = 1.0  # weight of the new step in the update
    lookahead: Scalar = 1.0  # weight of the new buffer in the update
    readout: Scalar = -1.0  # from params to the iterate to evaluate, in units of the buffer


class Rule(NamedTuple):
    """A method: ``init() -> carry`` and ``step(carry) -> (carry, Coefficients)``, scalars only.

    ``restart(carry) -> carry`` is what a restart leaves of the carry: without it, ``init()``.
    ``before_learning_rate``: the update is in units of the gradient, the learning rate is the next
    link of the chain, and readout includes it. ``at_params``: readout is 0 at every step, so params
    are the iterate to evaluate, whatever follows in the chain.
    """

    init: Callable[[], Any]
    step: Callable[[Any], tuple[Any, Coefficients]]
    restart: Callable[[Any], Any] | None = None
    before_learning_rate: bool = False
    at_params: bool = False


def constant(coefficients: Coefficients) -> Rule:
    """The rule of a method whose scalars never change: nothing is carried."""
    return Rule(init=lambda: (), step=lambda carry: (carry, coefficients))


def first_step() -> jax.Array:
    """The carry of rules that count: 0, int32."""
    return jnp.zeros([], jnp.int32)


def scalar(value: Any) -> Any:
    """A Python number as it is; an array as a real one of the default float dtype.

    ``optax.inject_hyperparams`` gives it the dtype of params, which may be bfloat16 or complex.
    """
    if isinstance(value, int | float):
        return value
    return jnp.real(jnp.asarray(value)).astype(float)


def at_step(value: optax.ScalarOrSchedule, k: jax.Array) -> Any:
    """The number itself, or the schedule's value at integer step ``k``."""
    # Widened to the default integer: under x64 an int32 step would make schedules float32.
    return scalar(value(k.astype(int)) if callable(value) else value)


def check_momentum(momentum: optax.ScalarOrSchedule) -> None:
    """Raises ValueError if ``momentum`` is a number outside [0, 1)."""
    hint = (
        "for momentum that tends to 1 pass a schedule such as nag_jax.schedules.convex(); "
        "bfloat16 rounds 0.999 to 1, so give inject_hyperparams hyperparam_dtype=jnp.float32"
    )
    check_range("momentum", momentum, 0.0, 1.0, schedule=True, hint=hint)


def check_horizon(horizon: Any) -> None:
    """Raises ValueError unless ``horizon`` is an integer of at least 1."""
    check_count("horizon", horizon, static=True, hint="the number of steps")


def optimized_t(horizon: int) -> list[float]:
    """OGM's t_0 .. t_N: FISTA's, except for the last."""
    check_horizon(horizon)
    t = [1.0]
    for k in range(horizon):
        t.append((1 + (1 + (8 if k == horizon - 1 else 4) * t[-1] ** 2) ** 0.5) / 2)
    return t


def check_conditioning(q: Any, *, below_one: bool = False) -> Any:
    """``q`` = mu/L as a Python float, or traced; ValueError outside (0, 1] or (0, 1)."""
    hint = "1/q is the condition number, and without a known mu use rules.fista() with a restart"
    check_range("q = mu/L", q, 0.0, 1.0, low_open=True, high_closed=not below_one, hint=hint)
    return scalar(q) if isinstance(q, Tracer) else float(q)


def stability_limit(
    beta: Scalar, kappa: Scalar, direct: Scalar = 1.0, lookahead: Scalar = 1.0
) -> Scalar:
    r"""The learning rate, in units of 1/L, from which on a method diverges on a quadratic.

    .. math:: \epsilon L < \frac{2 (1 + \beta)}{d\, (1 + \beta) + l\, \kappa}

    for constant coefficients: 2 for gradient descent, 4/3 for Nesterov's method as its momentum
    tends to 1, and exactly 1, no slack at all, for OGM and TMM.

    Args:
      beta: in [0, 1), from ``rules.Coefficients``; kappa, direct and lookahead likewise.

    Returns:
      A number.

    >>> [rules.stability_limit(*rule.step(())[1][:4]).__round__(3)
    ...  for rule in (rules.strongly_convex(1e-6), rules.tmm(1e-6))]
    [1.334, 1.0]
    """
    return 2 * (1 + beta) / (direct * (1 + beta) + lookahead * kappa)
