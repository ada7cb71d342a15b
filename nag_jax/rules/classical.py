"""Nesterov's own methods, in which the only scalar of a step is its momentum.

m' = momentum*(m + u),  update = u + m',  x_eval = params - m'
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from nag_jax._checks import check_range
from nag_jax._types import Scalar
from nag_jax.rules.rule import (
    Coefficients,
    Rule,
    at_step,
    check_conditioning,
    check_momentum,
    constant,
    first_step,
    next_step,
    scalar,
)

_Pair: TypeAlias = tuple[jax.Array, jax.Array]  # the step and alpha


def nesterov(momentum: optax.ScalarOrSchedule = 0.9) -> Rule:
    r"""Nesterov's method, exact under any schedule of learning rate and momentum.

    The buffer is the look-ahead offset :math:`s = y - x`, in units of the parameters, so
    ``accelerate`` is placed *after* the learning rate:
    ``chain(sgd(lr), accelerate(nesterov(0.9)))``. With :math:`u_t = -\epsilon_t \nabla f(y_t)`,

    .. math::
        x_{t+1} = y_t + u_t, \qquad
        y_{t+1} = x_{t+1} + \mu_{t+1} (x_{t+1} - x_t)

    which is equations 3-4 of Sutskever et al. at every step. ``optax.sgd(nesterov=True)`` gives the
    same numbers while the learning rate and the momentum are constant. For its numbers under
    schedules see :func:`trace`.

    Args:
      momentum: :math:`\mu`, dimensionless, a number in [0, 1) or a schedule of the integer
        step. ``momentum(t)`` extrapolates to the point where gradient number t is taken,
        t = 0, 1, ...; ``momentum(0)`` is not used, since there is no velocity yet.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if momentum is a number outside [0, 1).

    Example:
      >>> accelerated = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.nesterov(0.9)))

    References:
      Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
      learning, ICML 2013. Nesterov, A method of solving a convex programming problem with
      convergence rate O(1/k^2), Soviet Mathematics Doklady 27, 1983.
    """
    check_momentum(momentum)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        k = next_step(k)
        mu = at_step(momentum, k)
        return k, Coefficients(beta=mu, kappa=mu)

    return Rule(first_step, step)


def trace(
    momentum: optax.ScalarOrSchedule = 0.9, learning_rate: optax.ScalarOrSchedule = 0.0
) -> Rule:
    r"""The method of ``optax.trace(nesterov=True)`` and PyTorch, also under schedules.

    The buffer holds gradients, so ``accelerate`` is placed *before* the learning rate:
    ``chain(accelerate(trace(0.9, lr)), scale_by_learning_rate(lr))``. With gradient g,

    .. math::
        b_{t+1} = \mu_t b_t + g_t, \qquad
        y_{t+1} = y_t - \epsilon_t (g_t + \mu_t b_{t+1})

    This is Nesterov's method while the learning rate and the momentum are constant. Otherwise it
    differs from it by :math:`\mu^2 (\epsilon_{t-1} - \epsilon_t) b_t` in each step.

    Args:
      momentum: :math:`\mu`, dimensionless, a number in [0, 1) or a schedule of the integer step.
      learning_rate: :math:`\epsilon`, the same as given to ``scale_by_learning_rate``: a number
        of at least 0 or a schedule. Only ``eval_params`` uses it, to compute
        :math:`x_{t+1} = y_{t+1} + \epsilon_t \mu_t b_{t+1}`; with 0 it returns params.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if momentum is a number outside [0, 1) or learning_rate a negative one.

    Example:
      >>> before_lr = nag_jax.accelerate(rules.trace(0.9, learning_rate=0.1))
      >>> same_as_sgd = optax.chain(before_lr, optax.scale_by_learning_rate(0.1))
    """
    check_momentum(momentum)
    check_range("learning_rate", learning_rate, 0.0, schedule=True)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        mu = at_step(momentum, k)
        # The int32 step is what optax.scale_by_learning_rate gives the same schedule.
        lr = scalar(learning_rate(k) if callable(learning_rate) else learning_rate)
        coefficients = Coefficients(beta=mu, kappa=1.0, lookahead=mu, readout=lr * mu)
        return next_step(k), coefficients

    return Rule(first_step, step, before_learning_rate=True)


def fista() -> Rule:
    r"""FISTA's momentum for convex functions, which tends to 1 as :math:`1 - 3/k`.

    .. math::
        x_{k+1} = y_k + u_k, \qquad
        t_{k+1} = \frac{1 + \sqrt{1 + 4 t_k^2}}{2}, \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k), \qquad t_0 = 1

    With :math:`u = -\nabla f(y)/L` or ``prox_step`` of learning rate 1/L,
    :math:`f(x_k) - f^* \le L R^2 / (2 t_{k-1}^2) \le 2 L R^2 / (k + 1)^2`, where R is the distance
    from the start to the solution. The exact worst case of the code, which is in
    :doc:`the table of proofs </proved>`, comes close to the first bound: 0.87 of it after 10 steps.
    Without a restart it oscillates on strongly convex functions. The bound holds for a constant
    learning rate. For one that varies use :func:`estimate_sequence`.

    Returns:
      A rule whose carry is t, float ``[]``.

    Example:
      The loss after 1000 steps on a quadratic with curvatures 1 and 0.0001, of gradient descent,
      FISTA, and FISTA with a restart, which needs no knowledge of the curvature:

      >>> curvature = jnp.array([1.0, 0.0001])
      >>> links = {"plain": optax.identity(), "fista": nag_jax.accelerate(rules.fista()),
      ...          "restarted": nag_jax.accelerate(rules.fista(), restart=nag_jax.restart.gradient)}
      >>> for name, link in links.items():
      ...     params, optimizer = jnp.ones(2), optax.chain(optax.sgd(1.0), link)
      ...     def step(carry, _):
      ...         updates, state = optimizer.update(curvature * carry[0], carry[1])
      ...         return (optax.apply_updates(carry[0], updates), state), None
      ...     (x, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=1000)
      ...     x = x if name == "plain" else nag_jax.eval_params(x, state)
      ...     print(f"{name:10} {jnp.sum(curvature * x**2) / 2:.0e}")
      plain      4e-05
      fista      2e-09
      restarted  6e-18

    References:
      Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems, SIAM J. Imaging Sciences 2, 2009, equations 4.1-4.3 and theorem 4.4. Nesterov, A
      method of solving a convex programming problem with convergence rate O(1/k^2), 1983.
    """

    def step(t: jax.Array) -> tuple[jax.Array, Coefficients]:
        new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        mu = (t - 1) / new
        return new, Coefficients(beta=mu, kappa=mu)

    return Rule(lambda: jnp.ones([], float), step)


def chambolle_dossal(a: float = 3.0) -> Rule:
    r"""FISTA with :math:`t_k = (k + a)/a`, which oscillates less the larger a is.

    .. math:: y_{k+1} = x_{k+1} + \frac{k}{k + 1 + a} (x_{k+1} - x_k)

    With learning rate 1/L, :math:`f(x_k) - f^* \le a^2 L R^2 / (2 (k + a - 1)^2)`. A larger a is
    slower at first; with a > 2 the gap is also :math:`o(1/k^2)`. The iterates converge for every a
    that is allowed, since 2025 also proved for a = 2. For a = 3 the bound is loose: the exact worst
    case after 10 steps is 0.45 of it (:doc:`the table of proofs </proved>`). The rule is the same
    as ``nesterov(schedules.convex(a))``.

    Args:
      a: how fast the momentum grows, at least 2; larger is slower.

    Returns:
      A rule whose carry is the step, int32 ``[]``.

    Raises:
      ValueError: if a is below 2.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.chambolle_dossal(4.0)))

    References:
      Chambolle, Dossal, On the convergence of the iterates of the "fast iterative
      shrinkage/thresholding algorithm", J. Optimization Theory and Applications 166, 2015. Jang,
      Ryu, Point convergence of Nesterov's accelerated gradient method, 2025, arXiv:2510.23513.
      Boţ, Fadili, Nguyen, The iterates of Nesterov's accelerated algorithm converge in the critical
      regimes, 2025, arXiv:2510.22715.
    """
    check_range("a", a, 2.0)

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        mu = jnp.asarray(k, float) / (jnp.asarray(k, float) + (1 + scalar(a)))
        return next_step(k), Coefficients(beta=mu, kappa=mu)

    return Rule(first_step, step)


def strongly_convex(q: Scalar) -> Rule:
    r"""Nesterov's constant momentum for strongly convex functions with a known condition number.

    .. math:: \mu = \frac{1 - \sqrt q}{1 + \sqrt q}

    With learning rate 1/L,
    :math:`f(x_k) - f^* \le (1 - \sqrt q)^k (f(x_0) - f^* + \tfrac{\mu}{2} R^2)`. The bound is
    loose: for q = 0.1 the exact worst case after 10 steps is 0.19 of it
    (:doc:`the table of proofs </proved>`).

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1]. The bound needs a q that is not
        above the true one. 1/q is the condition number.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: if q is outside (0, 1].

    Example:
      >>> rules.strongly_convex(0.01).step(())[1].beta.__round__(4)
      0.8182

    References:
      Nesterov, Introductory Lectures on Convex Optimization, 2004, section 2.2.
    """
    root = check_conditioning(q) ** 0.5
    mu = (1 - root) / (1 + root)
    return constant(Coefficients(beta=mu, kappa=mu))


def estimate_sequence(
    learning_rate: optax.ScalarOrSchedule, strong_convexity: optax.ScalarOrSchedule = 0.0
) -> Rule:
    r"""Nesterov's general scheme, exact for a learning rate and a strong convexity that vary.

    .. math::
        \frac{\alpha_{k+1}^2}{\epsilon_{k+1}} = (1 - \alpha_{k+1}) \frac{\alpha_k^2}{\epsilon_k}
        + \mu_{k+1} \alpha_{k+1}, \qquad
        \beta_{k+1} = \frac{\alpha_k (1 - \alpha_k)}
        {\alpha_k^2 + \alpha_{k+1} \epsilon_k / \epsilon_{k+1}}, \qquad \alpha_0 = 1

    For a constant learning rate and :math:`\mu = 0` it is FISTA, with :math:`\alpha = 1/t`. For a
    constant :math:`\mu > 0` it tends to :func:`strongly_convex`. As long as
    :math:`\epsilon_k \le 1/L`,

    .. math::
        f(x_k) - f^* \le \frac{R^2}{2 \epsilon_0} \prod_{i=1}^{k-1} (1 - \alpha_i)
        = \frac{\alpha_{k-1}^2 R^2}{2 \epsilon_{k-1}} \text{ where } \mu = 0

    For a learning rate that grows to 1/L, the exact worst case after 10 steps is 0.83 of it
    (:doc:`the table of proofs </proved>`). The plain t of FISTA violates this bound once the
    learning rate grows. A learning rate of 0, with which a warm-up may start, restarts the scheme.

    Args:
      learning_rate: :math:`\epsilon`, the same as in the chain: a number above 0, or a
        schedule of the integer step with values of at least 0.
      strong_convexity: :math:`\mu`, in units of 1/learning_rate (the curvature itself, not q): a
        number of at least 0 or a schedule; learning_rate*strong_convexity must be below 1.

    Returns:
      A rule whose carry is the step, int32 ``[]``, and :math:`\alpha`, float ``[]``. A restart
      keeps the step, which belongs to the schedules.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> warmup = optax.linear_schedule(0.0, 0.1, 100)
      >>> kernel = nag_jax.accelerate(rules.estimate_sequence(warmup))
      >>> optimizer = optax.chain(optax.sgd(warmup), kernel)

    References:
      Nesterov, Introductory Lectures on Convex Optimization, 2004, scheme 2.2.6. Scheinberg,
      Goldfarb, Bai, Fast first-order methods for composite convex optimization with backtracking,
      Foundations of Computational Mathematics 14, 2014.
    """
    check_range("learning_rate", learning_rate, 0.0, low_open=True, schedule=True)
    check_range("strong_convexity", strong_convexity, 0.0, schedule=True)

    def step(carry: _Pair) -> tuple[_Pair, Coefficients]:
        k, alpha = carry
        after = next_step(k)
        at = lambda value, i: jnp.asarray(at_step(value, i), alpha.dtype)
        lr, lr_after = at(learning_rate, k), at(learning_rate, after)
        # The positive root of the equation for alpha, multiplied by both learning rates, since
        # either may be 0.
        mass = lr_after * alpha**2
        b = mass - lr * lr_after * at(strong_convexity, after)
        root = 2 * mass / jnp.where(mass > 0, b + jnp.sqrt(b**2 + 4 * lr * mass), 1.0)
        alpha_after = jnp.where(mass > 0, root, 1.0)
        scale = mass + lr * alpha_after
        beta = lr_after * alpha * (1 - alpha) / jnp.where(scale > 0, scale, 1.0)
        return (after, alpha_after), Coefficients(beta=beta, kappa=beta)

    return Rule(
        init=lambda: (first_step(), jnp.ones([], float)),
        step=step,
        restart=lambda carry: (carry[0], jnp.ones_like(carry[1])),
    )
