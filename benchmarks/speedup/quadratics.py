"""Quadratics of a known condition number, and the learning rates and momenta they bear.

``f(x) = (x - z)'A(x - z)/2`` in 32 dimensions, in a random basis, curvatures from 1/kappa to 1
evenly spaced in their logarithm, a start at 0 and a solution z for which every direction has about
the same share of the value. The measure is the number of steps until f has fallen to TARGET of its
start. Runs race: while tuning, all stop when the first is there.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speedup import optimizers
from benchmarks.speedup.training import Run

KAPPAS = (1e2, 1e3, 1e4, 1e5, 1e6)
TARGET = 1e-6
DIMENSIONS = 32
LARGE = 1e4  # a value this much above its start has diverged
MIDDLE = 1.25  # of the first learning rates, in units of 1/L


class Quadratic(NamedTuple):
    kappa: float
    most: int  # steps
    every: int  # steps between looks at f


def quadratic(kappa: float, quick: bool = False) -> Quadratic:
    return Quadratic(kappa, 500 if quick else round(3 * kappa + 1000), 20 if kappa > 1e4 else 1)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    before = jnp.zeros(()).dtype == jnp.float64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@functools.cache
def basis() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((DIMENSIONS, DIMENSIONS)))[0]


def hessian(kappa: float) -> np.ndarray:
    return (basis() * curvatures(kappa)) @ basis().T


def curvatures(kappa: float) -> np.ndarray:
    return np.logspace(-np.log10(kappa), 0, DIMENSIONS)


def solution(kappa: float, seed: int) -> np.ndarray:
    """The value at 0 is 1."""
    share = np.random.default_rng(seed).standard_normal(DIMENSIONS)
    share *= np.sqrt(2 / np.sum(share**2))
    return basis() @ (share / np.sqrt(curvatures(kappa)))


class Race:
    """Compiled for one quadratic and optimizer; the runs are arguments."""

    def __init__(self, problem: Quadratic, optimizer: optimizers.Optimizer):
        self.problem, self.optimizer = problem, optimizer
        self.run_all = jax.jit(self._run_all, static_argnames="first")

    def __call__(self, runs: list[Run], most: int, *, first: bool = False) -> tuple[Any, Any, Any]:
        """Steps to the target (-1: not there), last values, and whether each run diverged."""
        with float64():
            solutions = np.stack([solution(self.problem.kappa, run.seed) for run in runs])
            hyper = {"rate": jnp.asarray([run.rate for run in runs])}
            if self.optimizer.second:
                hyper[self.optimizer.second] = jnp.asarray([run.second for run in runs])
            found = self.run_all(jnp.asarray(solutions), hyper, most, first=first)
            steps, values, lost = map(np.asarray, found)
            return steps, values, lost

    def _run_all(self, solutions: Any, hyper: Any, most: Any, *, first: bool) -> Any:
        matrix = jnp.asarray(hessian(self.problem.kappa))
        setting = optimizers.Setting(self.problem.most)
        loss = lambda x, z: (x - z) @ matrix @ (x - z) / 2
        make = lambda hyper: optimizers.transformation(self.optimizer, setting, hyper)

        def step(params: Any, state: Any, hyper: Any, z: Any) -> Any:
            value, g = loss(params, z), matrix @ (params - z)
            updates, state = make(hyper).update(
                g, state, params, value=value, grad=g, value_fn=lambda x: loss(x, z)
            )
            return optax.apply_updates(params, updates), state

        def several(params: Any, state: Any) -> Any:
            def body(carry: Any, _: Any) -> Any:
                params, state = carry
                return jax.vmap(step)(params, state, hyper, solutions), None

            return jax.lax.scan(body, (params, state), length=self.problem.every)[0]

        def going(carry: Any) -> Any:
            _, _, hits, _, lost, count = carry
            there = jnp.any(hits >= 0) if first else jnp.all((hits >= 0) | lost)
            return (count < most) & ~there

        def body(carry: Any) -> Any:
            params, state, hits, _, lost, count = carry
            params, state = several(params, state)
            count = count + self.problem.every
            values = jax.vmap(loss)(jax.vmap(self.optimizer.evaluate)(params, state), solutions)
            hits = jnp.where((hits < 0) & ~lost & (values <= TARGET), count, hits)
            lost = lost | (~(values < LARGE) & (hits < 0))
            return params, state, hits, values, lost, count

        n, x = len(solutions), jnp.zeros_like(solutions)
        state = jax.vmap(lambda x, hyper: make(hyper).init(x))(x, hyper)
        carry = x, state, jnp.full(n, -1), jnp.ones(n), jnp.full(n, False), jnp.array(0)
        _, _, hits, values, lost, _ = jax.lax.while_loop(going, body, carry)
        return hits, values, lost


def stability(
    name: str, rates: np.ndarray, momenta: np.ndarray, kappa: float, steps: int
) -> np.ndarray:
    """log10 of f after ``steps``, ``[momenta, rates]``, rates in units of 1/L; inf: diverged."""
    race = Race(Quadratic(kappa, steps, steps), optimizers.OPTIMIZERS[name])
    runs = [Run(0, rate, momentum) for momentum in momenta for rate in rates]
    _, values, lost = race(runs, steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(lost | ~(values <= LARGE), np.inf, np.log10(np.maximum(values, 1e-300)))
    return found.reshape(len(momenta), len(rates))
