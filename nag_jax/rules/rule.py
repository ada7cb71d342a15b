"""The type of a rule, a few scalars per step, and the checks that rules share.

A rule is a pair ``(init, step)`` on scalars. ``init()`` returns the carry (a step count, FISTA's
``t``, ...) and ``step(carry)`` the next carry and the ``Coefficients`` of the step. With ``u`` the
incoming update and ``m`` the buffer of ``accelerate``, the coefficients mean

    m'     = beta*m + kappa*u
    update = direct*u + lookahead*m'
    x_eval = params + readout*m'

A constant coefficient is a Python float, so that it costs nothing on the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._checks import check_count, check_range
from nag_jax._types import ArrayLike, PyTree
from nag_jax._types import Scalar as Scalar


class Coefficients(NamedTuple):
    """The scalars of one step of ``accelerate``, as in the docstring of the module."""

    beta: Scalar  # decay of the buffer
    kappa: Scalar  # weight of the incoming update in the buffer
    direct: Scalar = 1.0  # weight of the incoming update in the update
    lookahead: Scalar = 1.0  # weight of the new buffer in the update
    readout: Scalar = -1.0  # from params to the iterate to evaluate, in units of the buffer


class Rule(NamedTuple):
    """A method, as functions of scalars.

    Args:
      init: ``() -> carry``, the scalars of the rule before the first step, any pytree.
      step: ``carry -> (carry, Coefficients)``, with a carry of the same shapes and dtypes.
      restart: ``carry -> carry``, the carry after a restart. None: ``init()``.
      before_learning_rate: whether the update is in units of the gradient. Then the learning rate
        is the next link of the chain, and readout includes it.
      at_params: whether readout is 0 at every step, so that params are the iterate to evaluate,
        whatever follows in the chain.
    """

    init: Callable[[], PyTree]
    step: Callable[[PyTree], tuple[PyTree, Coefficients]]
    restart: Callable[[PyTree], PyTree] | None = None
    before_learning_rate: bool = False
    at_params: bool = False


def constant(coefficients: Coefficients) -> Rule:
    """Returns a rule with the same coefficients at every step, and an empty carry.

    Args:
      coefficients: those of every step.
    """
    return Rule(init=lambda: (), step=lambda carry: (carry, coefficients))


def first_step() -> jax.Array:
    """Returns the carry of a rule that counts steps before the first one, 0, int32 ``[]``."""
    return jnp.zeros([], jnp.int32)


def next_step(k: jax.Array) -> jax.Array:
    """Returns k + 1, or k if that is the largest integer of its dtype."""
    return jnp.asarray(optax.safe_increment(k))


def scalar(value: ArrayLike) -> Scalar:
    """Returns a Python number unchanged, and an array as a real one of the default float dtype.

    Arrays come from ``optax.inject_hyperparams``, which gives them the dtype of params. That may be
    bfloat16 or complex.
    """
    if isinstance(value, int | float):
        return value
    return jnp.real(jnp.asarray(value)).astype(float)


def at_step(value: optax.ScalarOrSchedule, k: jax.Array) -> Scalar:
    """Returns the number itself, or the value of the schedule at step k.

    Args:
      value: a number or a schedule of the integer step.
      k: the step, an integer ``[]``.
    """
    # Widened to the default integer: under x64 an int32 step would make schedules float32.
    return scalar(value(k.astype(int)) if callable(value) else value)


def check_momentum(momentum: optax.ScalarOrSchedule) -> None:
    """Raises ValueError if ``momentum`` is a number outside [0, 1)."""
    hint = (
        "for momentum that tends to 1 pass a schedule such as nag_jax.schedules.convex(); "
        "bfloat16 rounds 0.999 to 1, so give inject_hyperparams hyperparam_dtype=jnp.float32"
    )
    check_range("momentum", momentum, 0.0, 1.0, schedule=True, hint=hint)


def check_horizon(horizon: object) -> None:
    """Raises ValueError unless ``horizon`` is an integer of at least 1."""
    check_count("horizon", horizon, static=True, hint="the number of steps")


def optimized_t(horizon: int) -> list[float]:
    """The t_0 .. t_N of OGM: those of FISTA, except for the last."""
    check_horizon(horizon)
    t = [1.0]
    for k in range(horizon):
        t.append((1 + (1 + (8 if k == horizon - 1 else 4) * t[-1] ** 2) ** 0.5) / 2)
    return t


def check_conditioning(q: Scalar, *, below_one: bool = False) -> Scalar:
    """``q`` = mu/L as a Python float, or traced; ValueError outside (0, 1] or (0, 1)."""
    hint = "1/q is the condition number, and without a known mu use rules.fista() with a restart"
    check_range("q = mu/L", q, 0.0, 1.0, low_open=True, high_closed=not below_one, hint=hint)
    return scalar(q) if isinstance(q, Tracer) else float(q)


def stability_limit(
    beta: Scalar, kappa: Scalar, direct: Scalar = 1.0, lookahead: Scalar = 1.0
) -> Scalar:
    r"""Returns the learning rate, in units of 1/L, above which a method diverges on quadratics.

    .. math:: \epsilon L < \frac{2 (1 + \beta)}{d\, (1 + \beta) + l\, \kappa}

    for constant coefficients: 2 for gradient descent, 4/3 for Nesterov's method as its momentum
    tends to 1, and exactly 1 for OGM and TMM, which have no margin.

    Args:
      beta: :math:`\beta`, decay of the buffer, in [0, 1).
      kappa: :math:`\kappa`, weight of the incoming update in the buffer.
      direct: d, weight of the incoming update in the update.
      lookahead: l, weight of the new buffer in the update.

    Returns:
      A number.

    Example:
      >>> [rules.stability_limit(*rule.step(())[1][:4]).__round__(3)
      ...  for rule in (rules.strongly_convex(1e-6), rules.tmm(1e-6))]
      [1.334, 1.0]
    """
    return 2 * (1 + beta) / (direct * (1 + beta) + lookahead * kappa)
