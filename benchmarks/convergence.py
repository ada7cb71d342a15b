"""Gradient evaluations to a relative gap, side by side with jaxopt, on scikit-learn's problems.

    python -m benchmarks.convergence

Needs jaxopt 0.8.5 and the packages of the examples. Writes results/convergence.json and the table
in README.md. A gradient evaluation of ``minimize`` is a step or a retry of its backtracking; one of
jaxopt is an iteration. The function values of neither's line search are counted. Products with the
Hessian for a learning rate of 1/L are counted apart.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks import convex_problems
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source, write_section

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convergence.json"
STEPS = 6000
SEARCHING = ("minimize (backtracking)", "jaxopt, line search")
GAPS = {"float64": (1e-3, 1e-6, 1e-9), "float32": (1e-3, 1e-6)}


def to_gaps(values: np.ndarray, low: float, gaps: tuple[float, ...]) -> list[int | None]:
    """The number of steps to each relative gap; None: not within the run."""
    below = [np.flatnonzero(values - low <= gap * abs(low)) for gap in gaps]
    return [int(hits[0]) + 1 if len(hits) else None for hits in below]


def hessian_products(problem: convex_problems.Problem) -> int:
    """How many ``largest_curvature`` spends: calls of the loss, run eagerly."""
    calls = []

    def loss(params: Any) -> jax.Array:
        calls.append(None)
        return problem.loss(params)

    with jax.disable_jit():
        nag_jax.largest_curvature(loss, problem.start)
    return len(calls)


def jaxopt_iterates(jaxopt: Any, problem: convex_problems.Problem, **arguments: Any) -> jax.Array:
    """Params of each iteration of its accelerated proximal gradient method."""
    # Under x64 optax's projections widen float32.
    prox = lambda v, _, step=1.0: (problem.prox(v, step) if problem.prox else v).astype(v.dtype)
    solver = jaxopt.ProximalGradient(
        problem.loss, prox, acceleration=True, tol=0, maxiter=STEPS, implicit_diff=False,
        **arguments,
    )  # fmt: skip

    def body(carry: Any, _: Any) -> Any:
        params, state = solver.update(*carry, None)
        return (params, state), params

    carry = problem.start, solver.init_state(problem.start, None)
    return jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[1])(carry)


def iterates(problem: convex_problems.Problem, optimizer: Any) -> jax.Array:
    """The evaluated iterate of each step of an optax optimizer."""
    tx = optax.with_extra_args_support(optimizer)

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        value, g = jax.value_and_grad(problem.loss)(params)
        updates, state = tx.update(g, state, params, value=value, grad=g, value_fn=problem.loss)
        params = optax.apply_updates(params, updates)
        return (params, state), nag_jax.eval_params(params, state)

    carry = problem.start, tx.init(problem.start)
    return jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[1])(carry)


def measure(jaxopt: Any, name: str, dtype: str) -> list[dict[str, Any]]:
    """One row for each method on one problem; objectives are computed in float64."""
    exact = next(p for p in convex_problems.problems() if p.name == name)
    problem = next(p for p in convex_problems.problems(jnp.dtype(dtype)) if p.name == name)
    lr = 1 / nag_jax.largest_curvature(problem.loss, problem.start)
    heads = nag_jax.proximal.prox_step(problem.prox, lr) if problem.prox else optax.sgd(lr)
    methods = {
        "gradient descent": iterates(problem, heads),
        "fista": iterates(problem, nag_jax.fista(lr, problem.prox, restart=None)),
        "fista + restart": iterates(problem, nag_jax.fista(lr, problem.prox)),
        "minimize (backtracking)": iterates(problem, nag_jax.backtracking(problem.prox)),
        "jaxopt, line search": jaxopt_iterates(jaxopt, problem),
        "jaxopt, stepsize=1/L": jaxopt_iterates(jaxopt, problem, stepsize=float(lr)),
    }
    if problem.prox is None:
        methods["optax.sgd(nesterov), 0.9"] = iterates(problem, optax.sgd(lr, 0.9, nesterov=True))
        methods["ogm + restart"] = iterates(problem, nag_jax.ogm(lr))
    objective = jax.jit(lambda xs: jax.lax.map(exact.objective, xs.astype(jnp.float64)))
    values = {method: np.asarray(objective(xs)) for method, xs in methods.items()}
    best = [np.nanmin(v) for v in values.values()] if dtype == "float64" else []
    low = min([float(exact.objective(jnp.asarray(exact.solve()))), *best])
    products = hessian_products(problem)
    return [
        {
            "problem": name,
            "dtype": dtype,
            "method": method,
            "gradients": to_gaps(v, low, GAPS[dtype]),
            "hessian_products": 0 if method in SEARCHING else products,
            "finite": bool(np.all(np.isfinite(v))),
        }
        for method, v in values.items()
    ]


def separable(jaxopt: Any) -> dict[str, Any]:
    """Steps of each default on separable logistic regression in float32 until it is not finite."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((80, 20))
    signs = np.sign(features @ (5 * rng.standard_normal(20)))
    margins = jnp.asarray(-signs[:, None] * features, jnp.float32)
    loss = lambda p: jnp.mean(jnp.logaddexp(jnp.float32(0), margins @ p))
    nothing = lambda p: 0.0
    start = jnp.zeros(20, jnp.float32)
    problem = convex_problems.Problem(
        "separable", loss, nothing, None, start, lambda: np.zeros(20), 0.0
    )
    lr = 1 / nag_jax.largest_curvature(loss, start)
    row = {}
    for name, xs in (
        ("jaxopt, line search", jaxopt_iterates(jaxopt, problem)),
        ("fista + restart", iterates(problem, nag_jax.fista(lr))),
        ("minimize (backtracking)", iterates(problem, nag_jax.backtracking())),
    ):
        bad = np.flatnonzero(~np.all(np.isfinite(np.asarray(xs)), axis=1))
        last = np.asarray(xs)[bad[0] - 1 if len(bad) else -1]
        row[name] = {
            "first_not_finite": int(bad[0]) + 1 if len(bad) else None,
            "last_finite_loss": float(loss(last)),
        }
    return row


def table(results: dict[str, Any]) -> str:
    """Gradients of each method, a row for each problem, and what happens on separable data."""
    methods = dict.fromkeys(row["method"] for row in results["rows"])
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["problem"], row["dtype"]), {})[row["method"]] = row
    body = []
    for (problem, dtype), rows in found.items():
        cells = [per_gap(rows[m]["gradients"]) if m in rows else "" for m in methods]
        products = max(row["hessian_products"] for row in rows.values())
        body.append([problem, dtype, *cells, products])
    separable = [
        [name, row["first_not_finite"] or "never", f"{row['last_finite_loss']:.1e}"]
        for name, row in results["separable"].items()
    ]
    head = ["separable logistic regression, float32", "not finite from", "last finite loss"]
    return (
        f"{source(results)} At most {results['steps']} steps.\n\n"
        f"{markdown(['problem', 'dtype', *methods, 'Hessian products'], body, 2)}\n\n"
        f"{markdown(head, separable)}"
    )


def per_gap(counts: list[int | None]) -> str:
    """The counts of one method, the largest gap first."""
    return " / ".join("-" if n is None else str(n) for n in counts)


def main() -> None:
    jaxopt = importlib.import_module("jaxopt")
    jax.config.update("jax_enable_x64", True)
    names = [problem.name for problem in convex_problems.problems()]
    rows = [
        row for dtype in GAPS for name in names for row in measure(jaxopt, name, dtype)
    ]  # fmt: skip
    results = {
        **describe_machine("benchmarks.convergence", ("jax", "optax", "jaxopt", "scikit-learn")),
        "steps": STEPS,
        "rows": rows,
        "separable": separable(jaxopt),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_section("convergence", table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
