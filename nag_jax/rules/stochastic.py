"""Rules for noisy gradients and for averaging; public as ``rules.agnes`` and so on.

All are in units of the parameters, so they are placed after the learning rate unless their
docstring says otherwise.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._checks import check_range
from nag_jax._types import Scalar
from nag_jax.rules.rule import (
    Coefficients,
    Rule,
    at_step,
    check_momentum,
    constant,
    first_step,
    next_step,
    scalar,
)

_Pair: TypeAlias = tuple[jax.Array, jax.Array]  # the step and j


def heavy_ball(momentum: optax.ScalarOrSchedule = 0.9) -> Rule:
    r"""Polyak's heavy-ball momentum.

    .. math:: m' = \mu_k m + u, \qquad \mathrm{update} = m'

    With a constant learning rate it is ``optax.sgd(momentum=...)``. It has an accelerated rate only
    for quadratics. With coefficients tuned for them it can cycle on other strongly convex
    functions.

    Args:
      momentum: :math:`\mu`, a number in [0, 1) or a schedule of the integer step.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if momentum is a number outside [0, 1).

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.heavy_ball(0.9)))

    References:
      Polyak, Some methods of speeding up the convergence of iteration methods, USSR Computational
      Mathematics and Mathematical Physics 4, 1964.
    """
    check_momentum(momentum)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        c = Coefficients(beta=at_step(momentum, k), kappa=1.0, direct=0.0, readout=0.0)
        return next_step(k), c

    return Rule(first_step, step, at_params=True)


def qhm(momentum: optax.ScalarOrSchedule = 0.999, nu: optax.ScalarOrSchedule = 0.7) -> Rule:
    r"""Quasi-hyperbolic momentum, a weighted mean of the step and its moving average.

    .. math:: m' = \mu_k m + (1 - \mu_k) u, \qquad \mathrm{update} = (1 - \nu_k) u + \nu_k m'

    With ``nu=momentum`` it is Nesterov's method with learning rate :math:`(1-\mu) \epsilon`. The
    paper averages gradients. For its numbers under a learning-rate schedule, place ``accelerate``
    *before* the learning rate, ``chain(accelerate(qhm()), scale_by_learning_rate(lr))``, as this
    rule allows.

    Args:
      momentum: :math:`\mu`, a number in [0, 1) or a schedule of the integer step.
      nu: :math:`\nu`, a number of at least 0, usually up to 1, or a schedule of the integer step.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> averaged = nag_jax.accelerate(rules.qhm(0.999, nu=0.7))
      >>> optimizer = optax.chain(averaged, optax.scale_by_learning_rate(1.0))

    References:
      Ma, Yarats, Quasi-hyperbolic momentum and Adam for deep learning, 2018, arXiv:1810.06801.
    """
    check_momentum(momentum)
    check_range("nu", nu, 0.0, schedule=True)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        mu, weight = at_step(momentum, k), at_step(nu, k)
        c = Coefficients(mu, kappa=1 - mu, direct=1 - weight, lookahead=weight, readout=0.0)
        return next_step(k), c

    return Rule(first_step, step, at_params=True)


def gpa(momentum: float = 0.9967, interpolation: float = 0.7) -> Rule:
    r"""Generalized primal averaging, which trains between an optimizer's iterate and its average.

    .. math::
        y = \mu_y x + (1 - \mu_y) z, \qquad z' = z + u(y), \qquad x' = \mu_x x + (1 - \mu_x) z'

    for the step u of any base optimizer: ``chain(adamw(lr), accelerate(gpa()))``. The iterate to
    evaluate is the average x. The sequence y is that of :func:`qhm` on the updates of the base
    optimizer, and with :math:`\mu_x = \mu_y` that of Nesterov's method with learning rate
    :math:`(1-\mu) \epsilon`. To replace an outer loop of H steps with momentum :math:`\mu`, take
    :math:`\mu_x = \mu^{1/H}`. Weight decay of the base optimizer acts on y.

    Args:
      momentum: :math:`\mu_x`, the decay of the average, in [0, 1).
      interpolation: :math:`\mu_y`, the weight of the average in y, in [0, 1).

    Returns:
      A rule without a carry.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> optimizer = optax.chain(optax.adamw(1e-3), nag_jax.accelerate(rules.gpa()))

    References:
      Defazio, Mishchenko, Raman, Shi, Xiao, Smoothing DiLoCo with primal averaging for faster
      training of LLMs, 2025, arXiv:2512.17131.
    """
    check_range("momentum", momentum, 0.0, 1.0)
    check_range("interpolation", interpolation, 0.0, 1.0)
    return constant(
        Coefficients(
            beta=momentum,
            kappa=1 - momentum,
            direct=1 - interpolation,
            lookahead=interpolation,
            readout=-(1 - interpolation) * momentum / (1 - momentum),
        )
    )


def ema_nesterov(decay: Scalar = 0.99, lookahead: optax.ScalarOrSchedule = 0.3) -> Rule:
    r"""EMA-Nesterov, which looks ahead along a moving average of the updates of any optimizer.

    .. math::
        x_{k+1} = y_k + u(y_k), \qquad
        m_{k+1} = \gamma m_k + (1 - \gamma) (x_{k+1} - x_k), \qquad
        y_{k+1} = x_{k+1} + b_{k+1} m_{k+1}

    where u is the step of the base optimizer, with its weight decay. The iterate to evaluate, x,
    is params without the look-ahead. Since :math:`x_{k+1} - x_k = b_k m_k + u`, the buffer of
    ``accelerate`` decays by :math:`\gamma + (1 - \gamma) b_k`. With :math:`\gamma = 0` it is
    :func:`nesterov`, and with a constant look-ahead it is :func:`agnes` with
    :math:`\rho = \gamma + (1 - \gamma) b` and the ratio :math:`(1 - \gamma) b / \rho`. The
    authors set the look-ahead to 0 in the first and the last part of training and let it follow
    the learning rate in between: ``schedules.follow_learning_rate``.

    Args:
      decay: :math:`\gamma`, the decay of the moving average, in [0, 1). The authors use 0.99.
      lookahead: b, dimensionless, a number in [0, 1) or a schedule of the integer step. The
        authors use largest values of 0.3 to 0.6. ``lookahead(k)`` belongs to the point where
        gradient number k is taken, k = 0, 1, ...

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
      >>> ahead = nag_jax.schedules.follow_learning_rate(0.3, rate, start=150, end=750)
      >>> kernel = nag_jax.accelerate(rules.ema_nesterov(0.99, ahead))
      >>> optimizer = optax.chain(optax.adamw(rate), kernel)

    References:
      Yau, Li, Glentis, Boreiko, Wai, Hong, EMA-Nesterov: stabilizing Nesterov's lookahead for
      accelerated deep learning optimization, 2026, arXiv:2605.25395.
    """
    check_range("decay", decay, 0.0, 1.0)
    hint = "from 1 on the moving average would grow without bound"
    check_range("lookahead", lookahead, 0.0, 1.0, schedule=True, hint=hint)
    kept = scalar(decay)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        after = next_step(k)
        ahead, then = at_step(lookahead, k), at_step(lookahead, after)
        c = Coefficients(
            beta=kept + (1 - kept) * ahead, kappa=1 - kept, lookahead=then, readout=-then
        )
        return after, c

    return Rule(first_step, step)


def agnes(momentum: optax.ScalarOrSchedule = 0.99, ratio: optax.ScalarOrSchedule = 0.01) -> Rule:
    r"""AGNES, Nesterov's method with a second step size, for noise that scales with the gradient.

    .. math::
        x_{k+1} = y_k + u_k, \qquad
        s_{k+1} = \rho_k (s_k + \tfrac{\alpha}{\eta} u_k), \qquad y_{k+1} = x_{k+1} + s_{k+1}

    with :math:`u = -\eta g`. A ratio of 1 is Nesterov's method, which diverges once the noise
    :math:`E\|g - \nabla f\|^2 = \sigma^2 \|\nabla f\|^2` has :math:`\sigma \ge 1`. With
    :math:`\eta = 1/(L (1 + \sigma^2))`, :math:`\rho = (1 + \sigma^2 - \sqrt q)/(1 + \sigma^2 +
    \sqrt q)` and a ratio of :math:`(1 - \sqrt q)/(1 - \sqrt q + \sigma^2)` the expected gap falls
    by the factor :math:`1 - \sqrt q/(1 + \sigma^2)` per step.

    Args:
      momentum: :math:`\rho`, a number in [0, 1) or a schedule of the integer step.
      ratio: :math:`\alpha/\eta`, a number of at least 0 or a schedule of the integer step. The
        authors' defaults are :math:`\alpha = 0.001` and :math:`\eta = 0.1`; the learning rate of
        the chain is :math:`\eta`, so decaying it decays both.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.agnes(0.99, 0.01)))

    References:
      Gupta, Siegel, Wojtowytsch, Nesterov acceleration despite very noisy gradients, 2023,
      arXiv:2302.05515.
    """
    check_momentum(momentum)
    check_range("ratio", ratio, 0.0, schedule=True)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        rho = at_step(momentum, k)
        return next_step(k), Coefficients(beta=rho, kappa=rho * at_step(ratio, k))

    return Rule(first_step, step)


def mass(alpha: float = 0.05, kappa: float = 12.0) -> Rule:
    r"""MaSS, Nesterov's method with a compensation term that keeps it accelerated under noise.

    .. math::
        w' = y - \eta g, \qquad
        y' = w' + \gamma (w' - w) + \eta_2 g, \quad \gamma = \frac{1 - a}{1 + a}, \quad
        \eta_2 = \eta\, \frac{1 - 1/\tilde\kappa}{1 + a}

    Args:
      alpha: a, in (0, 1]; :math:`1/\sqrt{\kappa \tilde\kappa}` for mini-batches.
      kappa: the statistical condition number :math:`\tilde\kappa`, at least 1.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.mass()))

    References:
      Liu, Belkin, Accelerating SGD with momentum for over-parameterized learning, 2018,
      arXiv:1810.13395.
    """
    check_range("alpha", alpha, 0.0, 1.0, low_open=True, high_closed=True)
    check_range("kappa", kappa, 1.0)
    beta = (1 - alpha) / (1 + alpha)
    return constant(Coefficients(beta=beta, kappa=(1 / kappa - alpha) / (1 + alpha)))


def accsgd(kappa: float = 1000.0, xi: float = 10.0, small_const: float = 0.7) -> Rule:
    r"""AccSGD, a mixture of a short and a long gradient step.

    .. math::
        w' = (1 - \beta) w + \beta (y - \tfrac{\kappa}{c} \epsilon g), \qquad
        y' = \zeta (y - \epsilon g) + (1 - \zeta) w'

    with :math:`\beta = 1 - c^2 \xi/\kappa` and :math:`\zeta = c/(c + \beta)`.

    Args:
      kappa: :math:`\kappa`, the ratio of the long to the short step, at least 1.
      xi: :math:`\xi`, the statistical advantage parameter, above 0; :math:`c^2 \xi` must be below
        kappa.
      small_const: c, which scales both step sizes and the mixture, in (0, 1].

    Returns:
      A rule without a carry.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.accsgd()))

    References:
      Jain, Kakade, Kidambi, Netrapalli, Sidford, Accelerating stochastic gradient descent, 2017,
      arXiv:1704.08227. Kidambi, Netrapalli, Jain, Kakade, On the insufficiency of existing
      momentum schemes for stochastic optimization, 2018, arXiv:1803.05591.
    """
    check_range("kappa", kappa, 1.0)
    check_range("small_const", small_const, 0.0, 1.0, low_open=True, high_closed=True)
    limit = kappa / small_const**2
    # A traced limit is known at run time only.
    check_range("xi", xi, 0.0, math.inf if isinstance(limit, Tracer) else limit, low_open=True)
    beta = 1 - small_const**2 * xi / kappa
    zeta = small_const / (small_const + beta)
    weight = (1 - zeta) * (beta * kappa / small_const - 1)
    return constant(Coefficients(beta=(1 - beta) * zeta, kappa=weight))


def srsgd(period: optax.ScalarOrSchedule = 100) -> Rule:
    r"""Scheduled restart SGD, FISTA-like momentum that restarts every ``period`` steps.

    .. math:: \mu_k = \frac{j - 1}{j + 2}, \qquad j = 1, 2, \ldots, \mathrm{period} - 1, 1, \ldots

    The restarts are scheduled, because a condition on noisy gradients would restart at random.

    Args:
      period: steps from one restart to the next, at least 2, or a schedule of the integer
        step (the authors let it grow).

    Returns:
      A rule whose carry is the step and j, int32 ``[]``.

    Raises:
      ValueError: if period is below 2.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.srsgd(period=100)))

    References:
      Wang, Nguyen, Sun, Bertozzi, Baraniuk, Osher, Scheduled restart momentum for accelerated
      stochastic gradient descent, 2020, arXiv:2002.10583.
    """
    check_range("period", period, 2, schedule=True)

    def step(carry: _Pair) -> tuple[_Pair, Coefficients]:
        k, j = carry
        i = jnp.asarray(j, float)
        mu = (i - 1) / (i + 2)
        after = jnp.where(i + 1 < at_step(period, k), j + 1, 1)
        return (next_step(k), after), Coefficients(beta=mu, kappa=mu)

    return Rule(lambda: (first_step(), first_step() + 1), step, lambda c: (c[0], first_step() + 1))
