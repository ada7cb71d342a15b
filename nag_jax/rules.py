"""Rules: each Nesterov-type method as a few scalars a step, for ``accelerate``.

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

from nag_jax._checks import check_range

Scalar = float | jax.Array


class Coefficients(NamedTuple):
    """The scalars of one step of the kernel (see the module's docstring)."""

    beta: Scalar  # decay of the buffer
    kappa: Scalar  # weight of the new step in the buffer
    direct: Scalar = 1.0  # weight of the new step in the update
    lookahead: Scalar = 1.0  # weight of the new buffer in the update
    readout: Scalar = -1.0  # from params to the iterate to evaluate, in units of the buffer


class Rule(NamedTuple):
    """A method: ``init() -> carry`` and ``step(carry) -> (carry, Coefficients)``, scalars only."""

    init: Callable[[], Any]
    step: Callable[[Any], tuple[Any, Coefficients]]


def nesterov(momentum: optax.ScalarOrSchedule = 0.9) -> Rule:
    r"""Nesterov's method, exact under any schedule of learning rate and momentum.

    The buffer is the look-ahead offset :math:`s = y - x`, in units of the parameters, so the
    kernel stands *after* the learning rate: ``chain(sgd(lr), accelerate(nesterov(0.9)))``.
    With :math:`u_t = -\epsilon_t \nabla f(y_t)`,

    .. math::
        x_{t+1} = y_t + u_t, \qquad
        y_{t+1} = x_{t+1} + \mu_{t+1} (x_{t+1} - x_t)

    which is equation 3-4 of Sutskever et al. at every step. The numbers of
    ``optax.sgd(nesterov=True)`` are the same while learning rate and momentum are constant; for
    its numbers under schedules see :func:`trace`.

    Args:
      momentum: :math:`\mu`, dimensionless, a number in [0, 1) or a schedule. ``momentum(t)``
        extrapolates the point where gradient number t is taken, t = 0, 1, ...; ``momentum(0)``
        is never used, since there is no velocity yet. A schedule gets the integer step.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if momentum is a number outside [0, 1).

    >>> accelerated = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.nesterov(0.9)))

    References:
      Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
      learning, ICML 2013. Nesterov, A method of solving a convex programming problem with
      convergence rate O(1/k^2), Soviet Mathematics Doklady 27, 1983.
    """
    check_momentum(momentum)

    def step(k: Any) -> tuple[Any, Coefficients]:
        k = optax.safe_increment(k)
        mu = at_step(momentum, k)
        return k, Coefficients(beta=mu, kappa=mu)

    return Rule(_first_step, step)


def trace(
    momentum: optax.ScalarOrSchedule = 0.9, learning_rate: optax.ScalarOrSchedule = 0.0
) -> Rule:
    r"""The buffer of ``optax.trace(nesterov=True)`` and PyTorch, schedules included.

    The buffer holds gradients, so the kernel stands *before* the learning rate:
    ``chain(accelerate(trace(0.9, lr)), scale_by_learning_rate(lr))``. With gradient g,

    .. math::
        b_{t+1} = \mu_t b_t + g_t, \qquad
        y_{t+1} = y_t - \epsilon_t (g_t + \mu_t b_{t+1})

    This is Nesterov's method while learning rate and momentum are constant. Otherwise it differs
    from it by :math:`\mu^2 (\epsilon_{t-1} - \epsilon_t) b_t` in each step.

    Args:
      momentum: :math:`\mu`, dimensionless, a number in [0, 1) or a schedule of the integer step.
      learning_rate: :math:`\epsilon`, the one given to ``scale_by_learning_rate``: a number of at
        least 0 or a schedule. Only ``eval_params`` needs it, to find
        :math:`x_{t+1} = y_{t+1} + \epsilon_t \mu_t b_{t+1}`; with 0 it returns params.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if momentum is a number outside [0, 1) or learning_rate a negative one.

    >>> before_lr = nag_jax.accelerate(rules.trace(0.9, learning_rate=0.1))
    >>> same_as_sgd = optax.chain(before_lr, optax.scale_by_learning_rate(0.1))
    """
    check_momentum(momentum)
    check_range("learning_rate", learning_rate, 0.0)

    def step(k: Any) -> tuple[Any, Coefficients]:
        mu = at_step(momentum, k)
        # The int32 step is what optax.scale_by_learning_rate gives the same schedule.
        lr = learning_rate(k) if callable(learning_rate) else learning_rate
        coefficients = Coefficients(beta=mu, kappa=1.0, lookahead=mu, readout=lr * mu)
        return optax.safe_increment(k), coefficients

    return Rule(_first_step, step)


def at_step(value: optax.ScalarOrSchedule, k: jax.Array) -> Any:
    """The number itself, or the schedule's value at integer step ``k``."""
    # Widened to the default integer: under x64 an int32 step would make schedules float32.
    return value(k.astype(int)) if callable(value) else value


def check_momentum(momentum: optax.ScalarOrSchedule) -> None:
    """Raises ValueError if ``momentum`` is a number outside [0, 1)."""
    hint = (
        "for momentum that tends to 1 pass a schedule such as nag_jax.schedules.convex(); "
        "bfloat16 rounds 0.999 to 1, so give inject_hyperparams hyperparam_dtype=jnp.float32"
    )
    check_range("momentum", momentum, 0.0, 1.0, hint=hint)


def _first_step() -> jax.Array:
    return jnp.zeros([], jnp.int32)
