"""The convex problems of benchmarks/stepsizes.py, with their curvature and lowest value known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import nag_jax
from benchmarks import convex_problems
from nag_jax import proximal


class Known(NamedTuple):
    """A problem, L as the reference may know it, and the lowest value; float64."""

    problem: convex_problems.Problem
    curvature: float
    low: float

    @property
    def gap(self) -> float:
        """At the start."""
        return float(self.problem.objective(self.problem.start)) - self.low


def suite() -> dict[str, Callable[[], Known]]:
    """A function for each problem, since some take seconds to build; needs float64."""
    named = {
        "quadratic, 1e2": lambda: quadratic(1e2),
        "quadratic, 1e4": lambda: quadratic(1e4),
        "quadratic, 1e6": lambda: quadratic(1e6),
        "tridiagonal": tridiagonal,
        "logistic, separable": lambda: logistic(noise=0.0, ridge=0.0, scales=0.0),
        "logistic, noisy": lambda: logistic(noise=3.0, ridge=0.0, scales=0.0),
        "logistic, badly scaled": lambda: logistic(noise=0.1, ridge=1e-5, scales=-2.0),
        "logistic with l1": sparse_logistic,
        "Huber": huber,
        "log-sum-exp, smooth": lambda: log_sum_exp(20.0),
        "log-sum-exp, sharp": lambda: log_sum_exp(1.0),
    }
    return named | {p.name: lambda p=p: _known(p) for p in convex_problems.problems()}


def quadratic(kappa: float, n: int = 100) -> Known:
    """Curvatures from 10/kappa to 10, evenly spaced in their logarithm."""
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))
    half = jnp.asarray(np.sqrt(np.logspace(np.log10(10 / kappa), 1, n))[:, None] * basis.T)
    solution = jnp.asarray(np.random.default_rng(2).standard_normal(n))
    loss = lambda p: jnp.sum((half @ (p - solution)) ** 2) / 2
    return Known(_smooth(f"quadratic, {kappa:.0e}", loss, n), 10.0, 0.0)


def tridiagonal(n: int = 401) -> Known:
    """Nesterov's worst function: no method is fast before step n/2."""
    loss = lambda p: (p[0] ** 2 + p[-1] ** 2 + jnp.sum(jnp.diff(p) ** 2) - 2 * p[0]) / 8
    largest = (1 + np.cos(np.pi / (n + 1))) / 2
    return Known(_smooth("tridiagonal", loss, n), largest, -n / (n + 1) / 8)


def logistic(noise: float, ridge: float, scales: float) -> Known:
    """200 points in 20 dimensions, features of size 1 to 10^scales; separable without noise."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((200, 20)) * np.logspace(0, scales, 20)
    signs = np.sign(features @ rng.standard_normal(20) + noise * rng.standard_normal(200))
    margins = jnp.asarray(-signs[:, None] * features)
    loss = lambda p: jnp.mean(jnp.logaddexp(0.0, margins @ p)) + ridge * jnp.sum(p**2) / 2
    return _known(_smooth("logistic", loss, 20), low=None if noise else 0.0)


def sparse_logistic() -> Known:
    rng = np.random.default_rng(4)
    features = rng.standard_normal((100, 200))
    signs = np.sign(features[:, :10] @ rng.standard_normal(10) + rng.standard_normal(100))
    margins = jnp.asarray(-signs[:, None] * features)
    loss = lambda p: jnp.mean(jnp.logaddexp(0.0, margins @ p))
    problem = _smooth("logistic with l1", loss, 200)
    penalty = lambda p: 0.02 * jnp.sum(jnp.abs(p))
    return _known(problem._replace(penalty=penalty, prox=proximal.l1(0.02)))


def huber() -> Known:
    """Robust regression, a tenth of the targets far off."""
    rng = np.random.default_rng(5)
    features = rng.standard_normal((200, 50)) * np.logspace(0, -1.5, 50)
    off = 20 * rng.standard_normal(200) * (rng.random(200) < 0.1)
    target = jnp.asarray(features @ rng.standard_normal(50) + 0.1 * rng.standard_normal(200) + off)
    design = jnp.asarray(features)

    def loss(p: Any) -> jax.Array:
        r = jnp.abs(design @ p - target)
        return jnp.mean(jnp.where(r <= 0.2, r**2 / 2, 0.2 * (r - 0.1)))

    largest = np.linalg.norm(features, 2) ** 2 / 200  # where no residual is large
    return _known(_smooth("Huber", loss, 50), float(largest))


def log_sum_exp(rho: float) -> Known:
    """O'Donoghue and Candes' example: the maximum of 100 planes, smoothed over a width of rho."""
    rng = np.random.default_rng(6)
    planes, offsets = rng.standard_normal((100, 20)), jnp.asarray(rng.standard_normal(100))
    design = jnp.asarray(planes)
    loss = lambda p: rho * jax.nn.logsumexp((design @ p - offsets) / rho)
    problem = _smooth("log-sum-exp", loss, 20)
    # The Hessian is a covariance over rho: at a hundred points, where it is largest.
    points = np.concatenate([3 * rng.standard_normal((100, 20)), np.zeros((1, 20))])
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(points)
    return _known(problem, float(np.max(np.linalg.norm(hessians, 2, axis=(1, 2)))))


def _smooth(name: str, loss: Callable[[Any], jax.Array], n: int) -> convex_problems.Problem:
    return convex_problems.Problem(
        name, loss, lambda p: 0.0, None, jnp.zeros(n), lambda: np.zeros(n), 0.0
    )


def _known(
    problem: convex_problems.Problem, curvature: float | None = None, low: float | None = None
) -> Known:
    """L at the start if none is given, and the lowest value that FISTA and Newton's method find."""
    if curvature is None:
        curvature = float(nag_jax.largest_curvature(problem.loss, problem.start, max_steps=1000))
    if low is None:
        optimizer = nag_jax.fista(1 / curvature, problem.prox)
        x = nag_jax.minimize(
            problem.loss, problem.start, optimizer, prox=problem.prox, tol=1e-10, max_steps=5000
        ).params
        values = [problem.objective(x), problem.objective(jnp.asarray(problem.solve()))]
        if problem.prox is None:
            flat, unravel = jax.flatten_util.ravel_pytree(x)
            loss = lambda p: problem.loss(unravel(p))
            newton = jax.jit(
                lambda p: p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p))
            )
            for _ in range(6):
                flat = newton(flat)
                values.append(loss(flat))
        low = float(np.nanmin(np.asarray(values)))
    return Known(problem, curvature, low)
