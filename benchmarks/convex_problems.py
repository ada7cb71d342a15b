"""Convex problems of scikit-learn, solved to its own solutions and beyond.

    python -m benchmarks.convex_problems [--plot convex.png]

Lasso and elastic net on diabetes, least squares with non-negative weights, a one-class support
vector machine, which is a quadratic on the simplex, and L2-regularized logistic regression on
breast cancer and digits: no step size is given, and none is tuned.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets, linear_model, svm
from sklearn.metrics.pairwise import rbf_kernel

import nag_jax
from examples.trainer.errors import UserError, expand
from nag_jax import proximal


class Problem(NamedTuple):
    """A smooth loss, what prox handles, and scikit-learn's solution of the same problem."""

    name: str
    loss: Callable[[Any], jax.Array]
    penalty: Callable[[Any], Any]
    prox: Any  # None: unconstrained and smooth
    start: jax.Array
    solve: Callable[[], np.ndarray]
    tol: float  # error at which the relative gap is below 1e-9, or 1e-6 in float32

    def objective(self, params: Any) -> jax.Array:
        return self.loss(params) + self.penalty(params)


def problems(dtype: Any = jnp.float64) -> list[Problem]:
    """All problems in ``dtype``; the reference solutions are float64 always."""
    wide = dtype == jnp.float64
    data: Any = datasets.load_diabetes()
    x, y = _standardized(data.data), data.target - data.target.mean()
    features, target = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    squares = lambda p: jnp.mean((features @ p - target) ** 2) / 2
    regression: dict[str, Any] = dict(
        loss=squares, start=jnp.zeros(10, dtype), tol=1e-6 if wide else 3e-3
    )
    nothing = lambda p: 0.0
    precise: dict[str, Any] = dict(fit_intercept=False, tol=1e-14, max_iter=100_000)

    def linear(model: Any) -> Callable[[], np.ndarray]:
        return lambda: model.fit(x, y).coef_

    return [
        Problem(
            name="lasso, diabetes",
            penalty=lambda p: jnp.sum(jnp.abs(p)),
            prox=proximal.l1(1.0),
            solve=linear(linear_model.Lasso(alpha=1.0, **precise)),
            **regression,
        ),
        Problem(
            name="elastic net, diabetes",
            penalty=lambda p: 0.5 * jnp.sum(jnp.abs(p)) + 0.25 * jnp.sum(p**2),
            prox=proximal.elastic_net(0.5, 0.5),
            solve=linear(linear_model.ElasticNet(alpha=1.0, l1_ratio=0.5, **precise)),
            **regression,
        ),
        Problem(
            name="non-negative, diabetes",
            penalty=nothing,
            prox=proximal.nonnegative(),
            solve=linear(linear_model.LinearRegression(positive=True, fit_intercept=False)),
            **regression,
        ),
        _one_class(dtype, 1e-6 if wide else 1e-5),
        _logistic("breast cancer", datasets.load_breast_cancer, dtype, 3e-7 if wide else 1e-5),
        _logistic("digits", datasets.load_digits, dtype, 1e-7 if wide else 5e-6),
    ]


def _one_class(dtype: Any, tol: float) -> Problem:
    """The dual of scikit-learn's one-class SVM with nu = 1/n: weights on the simplex."""
    x = _standardized(datasets.load_breast_cancer(return_X_y=True)[0])
    n, gamma = len(x), 0.01
    kernel = jnp.asarray(rbf_kernel(x, gamma=gamma), dtype)

    def solve() -> np.ndarray:
        arguments: Any = dict(gamma=gamma, nu=1 / n, tol=1e-12)
        model = svm.OneClassSVM(**arguments).fit(x)
        weights = np.zeros(n)
        weights[model.support_] = model.dual_coef_[0]
        return weights

    return Problem(
        name="one-class SVM, breast cancer",
        loss=lambda p: p @ kernel @ p / 2,
        penalty=lambda p: 0.0,
        prox=proximal.projection(optax.projections.projection_simplex),
        start=jnp.full(n, 1 / n, dtype),
        solve=solve,
        tol=tol,
    )


def _logistic(name: str, load: Any, dtype: Any, tol: float) -> Problem:
    """Multinomial logistic regression, C = 1, intercept in the last row and not penalized."""
    x, labels = load(return_X_y=True)
    x = _standardized(x)
    n, classes = len(labels), labels.max() + 1
    targets = np.eye(classes)[labels]
    if classes == 2:  # one column of signs: scikit-learn's binary model
        classes, targets = 1, 2.0 * labels[:, None] - 1
    design = jnp.asarray(np.c_[x, np.ones(n)], dtype)
    chosen = jnp.asarray(targets, dtype)

    def loss(p: Any) -> jax.Array:
        scores = design @ p
        if classes == 1:
            data = jax.nn.softplus(-chosen * scores)
        else:
            data = jax.nn.logsumexp(scores, axis=1) - jnp.sum(scores * chosen, axis=1)
        return jnp.mean(data) + jnp.sum(p[:-1] ** 2) / (2 * n)

    def solve() -> np.ndarray:
        model = linear_model.LogisticRegression(C=1.0, solver="newton-cg", tol=1e-8)
        model.fit(x, labels)
        return np.c_[model.coef_, model.intercept_].T

    start = jnp.zeros((design.shape[1], classes), dtype)
    return Problem(f"logistic, {name}", loss, lambda p: 0.0, None, start, solve, tol)


def _standardized(x: np.ndarray) -> np.ndarray:
    deviation = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


def gap_curve(problem: Problem, optimizer: Any, steps: int) -> np.ndarray:
    """The objective of the evaluated iterate after each step."""
    accelerated = optax.tree.get(optimizer.init(problem.start), "readout") is not None

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        value, g = jax.value_and_grad(problem.loss)(params)
        updates, state = optimizer.update(
            g, state, params, value=value, grad=g, value_fn=problem.loss
        )
        params = optax.apply_updates(params, updates)
        x = nag_jax.eval_params(params, state) if accelerated else params
        return (params, state), problem.objective(x)

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[1])
    return np.asarray(run((problem.start, optimizer.init(problem.start))))


def plot(path: Path, steps: int = 1500) -> None:
    """Gap against iteration for logistic regression on breast cancer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problem = next(p for p in problems() if p.name == "logistic, breast cancer")
    lr = 1 / nag_jax.largest_curvature(problem.loss, problem.start)
    ridge = 1 / len(datasets.load_breast_cancer(return_X_y=True)[1])  # the least curvature
    methods = {
        "gradient descent": optax.sgd(lr),
        "optax.sgd(nesterov=True), 0.9": optax.sgd(lr, 0.9, nesterov=True),
        "FISTA": nag_jax.fista(lr, restart=None),
        "FISTA + restart": nag_jax.fista(lr),
        "OGM + restart": nag_jax.ogm(lr),
        "TMM": nag_jax.tmm(lr, q=float(lr) * ridge),
        "backtracking, no step size": nag_jax.backtracking(),
    }
    low = float(problem.objective(jnp.asarray(problem.solve())))
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    for name, optimizer in methods.items():
        curve = gap_curve(problem, optax.with_extra_args_support(optimizer), steps)
        axes.semilogy(np.maximum(curve - low, 1e-16) / low, label=name)
    axes.set(xlabel="gradients", ylabel="relative gap", title=problem.name, ylim=(1e-12, 20))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def check_path(path: Path) -> None:
    """UserError where no plot can be saved, before the minute that it takes to compute one."""
    from matplotlib.figure import Figure

    if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        known = ".png, .pdf, .svg or another suffix that matplotlib knows"
        raise UserError(f"--plot={path}: must end with {known}")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--plot={path}: {wrong}; name a file in a folder that exists")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", help="where to save the plot of gaps")
    try:
        solve_all(parser.parse_args().plot)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def solve_all(plotted: str | None) -> None:
    """Prints the table, then plots."""
    path = expand(plotted) if plotted is not None else None
    if path is not None:
        check_path(path)
    jax.config.update("jax_enable_x64", True)
    print(f"{'problem':28} {'steps':>6} {'reason':>10} {'objective':>13} {'against sklearn':>16}")
    for problem in problems():
        result = nag_jax.minimize(problem.loss, problem.start, prox=problem.prox, tol=problem.tol)
        ours = float(problem.objective(result.params))
        theirs = float(problem.objective(jnp.asarray(problem.solve())))
        reason = nag_jax.Reason(int(result.reason)).name
        print(
            f"{problem.name:28} {int(result.steps):6} {reason:>10} {ours:13.8f} "
            f"{(ours - theirs) / theirs:16.1e}"
        )
    if path is not None:
        plot(path)


if __name__ == "__main__":
    main()
