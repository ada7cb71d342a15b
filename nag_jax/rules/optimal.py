"""Rules with optimal worst-case bounds for exact gradients; public as ``rules.ogm`` and so on.

They are up to twice as fast as Nesterov's method, but have no margin in the step size: the learning
rate before them must be 1/L, not above it (see ``rules.stability_limit``). With u = -gradient/L,

    m' = beta*m + kappa*u,  update = u + m',  params - m' is the gradient step from old params
"""

import itertools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._checks import check_range
from nag_jax._types import Scalar
from nag_jax.rules.rule import (
    Coefficients,
    Rule,
    check_conditioning,
    check_horizon,
    constant,
    first_step,
    next_step,
    optimized_t,
    scalar,
)

_Pair: TypeAlias = tuple[jax.Array, jax.Array]  # the step and t


def ogm(horizon: int | None = None) -> Rule:
    r"""The optimized gradient method for smooth convex functions, with half of FISTA's bound.

    .. math::
        x_{k+1} = y_k - \nabla f(y_k)/L, \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)
        + \frac{t_k}{t_{k+1}} (x_{k+1} - y_k)

    with FISTA's t. At any time :math:`f(x_k) - f^* \le L R^2 / (4 t_{k-1}^2)`. With a horizon N
    the last step uses :math:`t_N = (1 + \sqrt{1 + 8 t_{N-1}^2})/2`, the iterate to evaluate is
    :math:`y_N`, and :math:`f(y_N) - f^* \le L R^2 / (2 t_N^2)`. No first-order method has a better
    bound. It is attained; the one at any time nearly so, 0.99 of it after 10 steps
    (:doc:`the table of proofs </proved>`).

    Args:
      horizon: the number of steps N, at least 1; None: it is not known.

    Returns:
      A rule whose carry is the step, int32 ``[]``, and t, float ``[]``.

    Raises:
      ValueError: if horizon is not an integer or is below 1.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.ogm()))  # L = 10

    References:
      Drori, Teboulle, Performance of first-order methods for smooth convex minimization: a novel
      approach, 2012, arXiv:1206.3209. Kim, Fessler, Optimized first-order methods for smooth
      convex minimization, 2014, arXiv:1406.5468, algorithm OGM1.
    """
    if horizon is not None:
        check_horizon(horizon)

    def step(carry: _Pair) -> tuple[_Pair, Coefficients]:
        k, t = carry
        last = False if horizon is None else k + 1 == horizon
        new = (1 + jnp.sqrt(1 + jnp.where(last, 8, 4) * t * t)) / 2
        readout = -1.0 if horizon is None else jnp.where(last, 0.0, -1.0)
        c = Coefficients(beta=(t - 1) / new, kappa=(2 * t - 1) / new, readout=readout)
        return (next_step(k), new), c

    return Rule(lambda: (first_step(), jnp.ones([], float)), step)


def ogm_g(horizon: int) -> Rule:
    r"""OGM-G, which makes the gradient of smooth convex functions small in a known number of steps.

    :math:`\|\nabla f(y_N)\|^2 \le 2 L (f(y_0) - f^*) / \tilde\theta_0^2`, with OGM's t in reverse:
    :math:`\tilde\theta_N = 1`, :math:`\tilde\theta_k = (1 + \sqrt{1 + 4 \tilde\theta_{k+1}^2})/2`
    and 8 instead of 4 for k = 0. The iterate to evaluate is y, which params hold. Started from
    the result of N steps of FISTA, :math:`\|\nabla f(y_N)\| \le 2 L R / ((N + 1) \tilde\theta_0)`.
    The first bound is attained. The exact worst case for the second is 0.79 of it at N = 5
    (:doc:`the table of proofs </proved>`).

    Args:
      horizon: the number of steps N, at least 1. Later steps are plain gradient descent.

    Returns:
      A rule whose carry is the step, int32 ``[]``; the horizon's scalars are a table.

    Raises:
      ValueError: if horizon is not an integer or is below 1.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.ogm_g(horizon=200)))

    References:
      Kim, Fessler, Optimizing the efficiency of first-order methods for decreasing the gradient of
      smooth convex functions, 2018, arXiv:1803.06600.
    """
    theta = optimized_t(horizon)[::-1]
    table = [
        ((a - 1) * (2 * b - 1) / (a * (2 * a - 1)), (2 * b - 1) / (2 * a - 1))
        for a, b in itertools.pairwise(theta)
    ]

    def step(k: jax.Array) -> tuple[jax.Array, Coefficients]:
        beta, gamma = jnp.asarray([*table, (0.0, 0.0)], float)[jnp.minimum(k, horizon)]
        return next_step(k), Coefficients(beta, kappa=beta + gamma, readout=0.0)

    return Rule(first_step, step, at_params=True)


def tmm(q: Scalar) -> Rule:
    r"""The triple momentum method, the fastest one with constant coefficients, for known mu/L.

    With :math:`\rho = 1 - \sqrt q`: :math:`\beta = \rho^2/(2-\rho)`, :math:`\kappa =
    2\rho/(2-\rho)`, and the iterate to evaluate lies *ahead* of params,
    :math:`y + m \rho / (2 (1-\rho))`. There
    :math:`f - f^* \le \rho^{2k} \frac{L^2}{2 \mu} R^2`, the square of Nesterov's rate per step. It
    is attained. It also holds at the result of the gradient step, params - m, in the cases computed
    (:doc:`the table of proofs </proved>`): up to 10 steps at q = 0.1.

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1]. The bound needs a q that is not
        above the true one.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: if q is outside (0, 1].

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.tmm(q=1e-3)))  # L = 10

    References:
      Van Scoy, Freeman, Lynch, The fastest known globally convergent first-order method for
      minimizing strongly convex functions, IEEE Control Systems Letters 2, 2018.
    """
    rho = 1 - check_conditioning(q) ** 0.5
    beta, kappa = rho**2 / (2 - rho), 2 * rho / (2 - rho)
    return constant(Coefficients(beta=beta, kappa=kappa, readout=rho / (2 * (1 - rho))))


def item(q: Scalar) -> Rule:
    r"""The information-theoretic exact method: optimal distance to the solution, for known mu/L.

    :math:`\|z_k - x^*\|^2 \le R^2 / (1 + q A_k)` at the iterate to evaluate, z, with
    :math:`A_0 = 0` and
    :math:`(1-q)^2 A_{k+1} = (1+q) A_k + 2 (1 + \sqrt{(1 + A_k)(1 + q A_k)})`. No first-order
    method has a better worst case, and the bound is attained
    (:doc:`the table of proofs </proved>`). It tends to :func:`tmm`. A overflows float32 after about
    :math:`44/\sqrt q` steps, so the carry is :math:`c = 1/(1 + A)` instead. With
    :math:`r = \sqrt{q + (1-q) c}` the method's own constants are :math:`b = (1-r)/(1+r)` and
    :math:`\delta = (c+r)/(r^2 + q c)`.

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1). The bound needs a q that is not
        above the true one.

    Returns:
      A rule whose carry is c, float ``[]``.

    Raises:
      ValueError: if q is outside (0, 1).

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.item(q=1e-3)))  # L = 10

    References:
      Taylor, Drori, An optimal gradient method for smooth strongly convex minimization, 2021,
      arXiv:2101.09741.
    """
    q = check_conditioning(q, below_one=True)
    radius = lambda c: jnp.sqrt(q + (1 - q) * c)

    def step(c: jax.Array) -> tuple[jax.Array, Coefficients]:
        r = radius(c)
        delta = (c + r) / (r * r + q * c)
        c = c / (c + ((1 + r) / (1 - q)) ** 2)
        ahead = radius(c)
        overshoot = (1 - ahead) / (2 * ahead)  # b'/(1 - b'), and 1 - b' is 2 ahead/(1 + ahead)
        weight = 2 * ahead / (1 + ahead)
        beta = weight * (1 - q * delta) * (1 - r) / (2 * r)
        return c, Coefficients(beta=beta, kappa=weight * (delta - 1), readout=overshoot)

    return Rule(lambda: jnp.ones([], float), step)


def sc_ogm(q: Scalar) -> Rule:
    r"""OGM for strongly convex functions, with constant coefficients.

    With :math:`\kappa = 1/q` and :math:`\gamma = (\sqrt{8 \kappa + 1} + 3)/(2 \kappa - 2)`, the
    buffer decays by :math:`\beta = 1/(2\gamma + 1)`, and the new step has the weight
    :math:`2 \beta`. The iterate to evaluate is the result of the gradient step, and
    :math:`f(x_k) - f^* \le \frac{L R^2}{2} (1 + \gamma)^{-k}`. The rate lies between those of
    ``strongly_convex`` and :func:`tmm`. For q = 0.1 the exact worst case is 0.86 of the bound after
    4 steps and 0.40 after 10 (:doc:`the table of proofs </proved>`).

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1). The bound needs a q that is not
        above the true one.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: if q is outside (0, 1).

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), nag_jax.accelerate(rules.sc_ogm(q=1e-3)))

    References:
      Park, Salas, Ryu, Factor-sqrt(2) acceleration of accelerated gradient methods, 2021,
      arXiv:2102.07366.
    """
    q = check_conditioning(q, below_one=True)
    gamma = ((8 / q + 1) ** 0.5 + 3) / (2 / q - 2)
    beta = 1 / (2 * gamma + 1)
    return constant(Coefficients(beta=beta, kappa=2 * beta))


def lessard(alpha: Scalar, beta: Scalar, gamma: Scalar) -> Rule:
    r"""The family of all methods with two past iterates and constant coefficients.

    .. math::
        y_k = \xi_k + \gamma (\xi_k - \xi_{k-1}), \qquad
        \xi_{k+1} = \xi_k + \beta (\xi_k - \xi_{k-1}) - \alpha \epsilon \nabla f(y_k)

    with the learning rate :math:`\epsilon` of the chain. Gradient descent is beta = gamma = 0,
    heavy ball gamma = 0, Nesterov's method gamma = beta. The iterate to evaluate is
    :math:`\xi`. Any bound depends on the three numbers. That of :func:`robust_momentum`, which is
    computed through this rule, is in :doc:`the table of proofs </proved>`.

    Args:
      alpha: :math:`\alpha`, the step size in units of the chain's learning rate, above 0.
      beta: :math:`\beta`, the momentum of the iterate, in [0, 1); above 0 unless gamma is 0.
      gamma: :math:`\gamma`, the extrapolation to the point of the gradient, at least 0.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> rules.lessard(1.0, beta=0.9, gamma=0.9).step(())[1].direct  # Nesterov's method
      1.0

    References:
      Lessard, Recht, Packard, Analysis and design of optimization algorithms via integral
      quadratic constraints, 2014, arXiv:1408.3595.
    """
    check_range("alpha", alpha, 0.0, low_open=True)
    check_range("beta", beta, 0.0, 1.0)
    check_range("gamma", gamma, 0.0)
    # The ratio is gamma/beta, and 0 where both are 0.
    if isinstance(beta, Tracer) or isinstance(gamma, Tracer):
        ratio = gamma / jnp.where(gamma == 0, 1.0, beta)
    elif beta == 0 and gamma != 0:
        raise ValueError(f"beta must be above 0 where gamma is not 0, got gamma={gamma!r}")
    else:
        ratio = gamma / (1.0 if gamma == 0 else beta)
    return constant(
        Coefficients(
            beta=beta,
            kappa=alpha,
            direct=alpha * ratio,
            lookahead=1 + gamma - ratio,
            readout=-gamma,
        )
    )


def robust_momentum(q: Scalar, robustness: Scalar = 0.5) -> Rule:
    r"""The robust momentum method, a compromise between speed and the amplification of noise.

    With :math:`\kappa = 1/q` and
    :math:`\rho = \lambda (1 - 1/\kappa) + (1-\lambda)(1 - 1/\sqrt\kappa)`, it is
    :func:`lessard` with

    .. math::
        \alpha = \kappa (1-\rho)^2 (1+\rho), \qquad
        \beta = \frac{\kappa \rho^3}{\kappa - 1}, \qquad
        \gamma = \frac{\rho^3}{(\kappa - 1)(1-\rho)^2 (1+\rho)}

    and the error falls by the factor :math:`\rho` per step, for the learning rate 1/L. For the
    Lyapunov function of the paper that is exact (:doc:`the table of proofs </proved>`). The larger
    :math:`\lambda`, the slower it is, and the less it amplifies noise in the gradients.

    Args:
      q: strong convexity over smoothness, mu/L, in (0, 1). The bound needs a q that is not
        above the true one.
      robustness: :math:`\lambda` in [0, 1]: 0 is the triple momentum method, 1 has the rate of
        gradient descent.

    Returns:
      A rule without a carry.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> rules.robust_momentum(0.01, robustness=0.0).step(())[1].kappa.__round__(3)
      1.9

    References:
      Cyrus, Hu, Van Scoy, Lessard, A robust accelerated optimization algorithm for strongly convex
      functions, 2017, arXiv:1710.04753.
    """
    q = check_conditioning(q, below_one=True)
    check_range("robustness", robustness, 0.0, 1.0, high_closed=True)
    weight = scalar(robustness)
    rho = weight * (1 - q) + (1 - weight) * (1 - q**0.5)
    alpha = (1 - rho) ** 2 * (1 + rho) / q
    return lessard(alpha, beta=rho**3 / (1 - q), gamma=rho**3 / ((1 / q - 1) * q * alpha))
