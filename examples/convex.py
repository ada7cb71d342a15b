"""Lasso and logistic regression to nine digits: how many gradients each method needs.

    python -m examples.convex [--plot convex.png]

A method is a step and a rule for the momentum. The step size is 1/L, with the largest curvature L.
`backtracking`, which `minimize` runs, needs no step size but another value of the loss for about
each gradient. The objective to reach is that of scikit-learn's solution.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.preprocessing import scale

import nag_jax
from nag_jax import accelerate, proximal, restart, rules


class Problem(NamedTuple):
    loss: Callable[[jax.Array], jax.Array]  # the smooth part of the objective
    objective: Callable[[jax.Array], jax.Array]
    prox: proximal.Prox  # of the other part
    solution: jax.Array  # scikit-learn's


def lasso() -> Problem:
    x, y = load_diabetes(return_X_y=True)
    x, y = scale(x), scale(y, with_std=False)
    model = Lasso(alpha=1.0, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y)
    loss = lambda w: jnp.mean((x @ w - y) ** 2) / 2
    objective = lambda w: loss(w) + jnp.abs(w).sum()
    return Problem(loss, objective, proximal.l1(1.0), jnp.asarray(model.coef_))


def logistic_regression() -> Problem:
    x, y = load_breast_cancer(return_X_y=True)
    x, signs = scale(x), 2.0 * y - 1
    model = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cg", tol=1e-8).fit(x, y)
    loss = lambda w: jnp.logaddexp(0.0, -signs * (x @ w)).mean() + w @ w / (2 * len(x))
    return Problem(loss, loss, lambda w, step: w, jnp.asarray(model.coef_[0]))


def gap_curve(
    problem: Problem, optimizer: optax.GradientTransformationExtraArgs, steps: int
) -> np.ndarray:
    """After each gradient, by how much the objective is above scikit-learn's, relative to it."""

    def step(carry: tuple[optax.Params, optax.OptState], _: None):
        params, state = carry
        value, gradient = jax.value_and_grad(problem.loss)(params)
        updates, state = optimizer.update(  # backtracking needs value and value_fn
            gradient, state, params, value=value, grad=gradient, value_fn=problem.loss
        )
        params = optax.apply_updates(params, updates)
        return (params, state), problem.objective(nag_jax.eval_params(params, state))

    start = jnp.zeros_like(problem.solution)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[1])
    values = run((start, optimizer.init(start)))
    return np.asarray(values / problem.objective(problem.solution) - 1)


def main(argv: list[str] | None = None) -> dict[tuple[str, str], np.ndarray]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15_000, help="most gradients of a method")
    parser.add_argument("--plot", type=Path, help="file for a plot of the gaps, such as gaps.png")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    figure = Figure(figsize=(10, 4), layout="constrained")
    if options.plot and options.plot.suffix[1:] not in figure.canvas.get_supported_filetypes():
        parser.error(f"--plot must end with .png, .pdf or .svg, got {options.plot}")

    jax.config.update("jax_enable_x64", True)
    problems = {"lasso": lasso(), "logistic regression": logistic_regression()}
    curves = {}
    for (title, problem), axes in zip(problems.items(), figure.subplots(1, 2), strict=True):
        start = jnp.zeros_like(problem.solution)
        step = proximal.prox_step(problem.prox, 1 / nag_jax.largest_curvature(problem.loss, start))
        methods = {
            "gradient descent": optax.chain(step, accelerate(rules.nesterov(0.0))),
            "momentum 0.9": optax.chain(step, accelerate(rules.nesterov(0.9))),
            "FISTA": optax.chain(step, accelerate(rules.fista())),
            "FISTA, restarted": optax.chain(step, accelerate(rules.fista(), restart.gradient)),
            "backtracking": nag_jax.backtracking(problem.prox),
        }
        print(f"{title}: gradients until the relative gap is at most 1e-3, 1e-6 and 1e-9")
        for name, optimizer in methods.items():
            curve = curves[title, name] = gap_curve(problem, optimizer, options.steps)
            axes.loglog(np.arange(1, len(curve) + 1), np.maximum(curve, 1e-15), label=name)
            counts = [np.flatnonzero(curve <= gap)[:1] + 1 for gap in (1e-3, 1e-6, 1e-9)]
            print(f"  {name:16}", *(f"{n[0] if n.size else '-':>6}" for n in counts))
        axes.set(title=title, xlabel="gradients", ylabel="relative gap", ylim=(1e-12, None))
        axes.legend()
        result = nag_jax.minimize(problem.loss, start, prox=problem.prox)
        gap = problem.objective(result.params) / problem.objective(problem.solution) - 1
        reason = nag_jax.Reason(int(result.reason)).name
        print(f"  minimize: {reason} after {result.steps} gradients, relative gap {gap:.1e}")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.plot, dpi=120)
    return curves


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
