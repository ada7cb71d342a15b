"""The exact worst case of an optimizer over every function of a class, computed by PEPit.

A method with fixed scalars stays in the span of its start and of the gradients it has seen. So here
params are coefficients over these vectors. The optimizer runs unchanged, each gradient is a new
unit vector, and PEPit maximizes over all functions that have these gradients at these points.
"""

import functools
import warnings

import jax.numpy as jnp
import numpy as np
import optax
from PEPit import PEP, Expression, Point
from PEPit.functions import ConvexFunction, SmoothStronglyConvexFunction

import nag_jax

SIZE = 32  # more than the gradients and subgradients of a run; one shape, so that jax compiles once


class Problem:
    """All f that are 1-smooth and q-strongly convex, plus any convex penalty if composite."""

    def __init__(self, q=0.0, composite=False):
        self.pep = PEP()
        self.f = self.pep.declare_function(SmoothStronglyConvexFunction, mu=q, L=1.0)
        self.penalty = self.pep.declare_function(ConvexFunction) if composite else None
        self.objective = self.f + self.penalty if composite else self.f
        self.solution = self.objective.stationary_point()
        self.basis = [self.pep.set_initial_point()]
        self.start = jnp.eye(SIZE)[0]
        self.proximal_points = []  # coefficients, and the value of the penalty there

    def point(self, v):
        """The vector that the coefficients stand for."""
        terms = (float(c) * p for c, p in zip(v, self.basis, strict=False) if c)
        return functools.reduce(Point.__add__, terms)

    def gradient(self, v):
        return self._append(self.f.gradient(self.point(v)))

    def prox(self, v, step):
        """The proximal operator of the penalty."""
        subgradient, value = Point(), Expression()
        z = v - step * self._append(subgradient)
        self.penalty.add_point((self.point(z), subgradient, value))
        self.proximal_points.append((z, value))
        return z

    def run(self, optimizer, steps, start=None):
        """Params and the iterates to evaluate, after 0, 1, .. steps."""
        params = self.start if start is None else start
        state = optimizer.init(params)
        ys, xs = [params], [params]
        for _ in range(steps):
            updates, state = optimizer.update(self.gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            ys.append(params)
            xs.append(nag_jax.eval_params(params, state))
        return ys, xs

    def gap(self, v):
        """The objective at v, less that at the solution."""
        value = self.f(self.point(v))
        if self.penalty:
            near = lambda z: np.allclose(z, v, rtol=0, atol=1e-12)
            known = [penalty for z, penalty in self.proximal_points if near(z)]
            value += known[0] if known else self.penalty(self.point(v))
        return value - self.objective(self.solution)

    def distance(self, v):
        """The squared distance to the solution."""
        return (self.point(v) - self.solution) ** 2

    def slope(self, v):
        """The squared norm of the gradient."""
        return self.f.gradient(self.point(v)) ** 2

    def worst(self, at_start, at_end):
        """The largest ``at_end`` among problems where ``at_start`` is at most 1."""
        self.pep.set_initial_condition(at_start <= 1)
        self.pep.set_performance_metric(at_end)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy warns that the last digits are not exact
            return float(self.pep.solve(solver="CLARABEL", verbose=0))

    def _append(self, vector):
        self.basis.append(vector)
        return jnp.eye(SIZE)[len(self.basis) - 1]
