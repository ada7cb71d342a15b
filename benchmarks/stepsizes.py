"""Gradients and values that automatic step sizes need, compared with NAG with restart and known L.

    python -m benchmarks.stepsizes

Needs jaxopt 0.8.5 and the packages of the examples. Writes results/stepsizes.json and the table in
README.md. Gaps are relative to that at the start. Everything is float64.

A gradient evaluation of ``backtracking`` and ``adanag`` is a step, a retry or the trial step too;
of jaxopt's accelerated solver an iteration; of ``optax.lbfgs`` one point of its zoom line search,
which needs a gradient with each value. Values are those in addition to one per gradient.
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
from benchmarks import problems
from benchmarks.convergence import per_gap
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source, write_section

RESULTS = Path(__file__).parent / "results" / "stepsizes.json"
GAPS = (1e-6, 1e-9)
STEPS = 10_000
REFERENCE, OURS = "NAG + restart, known L", "backtracking"


def evaluations(known: problems.Known, optimizer: Any, steps: int = STEPS) -> dict[str, Any]:
    """Gradients and values until the evaluated iterate is within each of GAPS."""
    problem, tx = known.problem, optax.with_extra_args_support(optimizer)
    gaps = jnp.asarray(GAPS) * known.gap

    def going(carry: Any) -> jax.Array:
        *_, hits, finite, step = carry
        return (step < steps) & finite & jnp.any(hits[0] < 0)

    def body(carry: Any) -> Any:
        params, state, searched, hits, _, step = carry
        value, g = jax.value_and_grad(problem.loss)(params)
        updates, state = tx.update(g, state, params, value=value, grad=g, value_fn=problem.loss)
        params = optax.apply_updates(params, updates)
        x: Any = nag_jax.eval_params(params, state)
        trials = optax.tree.get(state, "num_linesearch_steps")  # each a value and a gradient
        searched = searched + (1 if trials is None else trials)
        new = (problem.objective(x) - known.low <= gaps) & (hits[0] < 0)
        first = 0 if trials is None else 1  # the accepted trial is the next step's gradient
        counts = jnp.stack([searched + first, optax.tree.get(state, "values", jnp.array(0))])
        hits = jnp.where(new[None], counts[:, None], hits)
        return params, state, searched, hits, jnp.all(jnp.isfinite(x)), step + 1

    start = problem.start
    none = jnp.full((2, len(GAPS)), -1)
    carry = (start, tx.init(start), jnp.array(0), none, jnp.array(True), jnp.array(0))
    hits = np.asarray(jax.jit(lambda c: jax.lax.while_loop(going, body, c))(carry)[3])
    gradients, values = ([int(n) if n >= 0 else None for n in row] for row in hits)
    return {"gradients": gradients, "values": values}


def of_jaxopt(jaxopt: Any, known: problems.Known) -> dict[str, Any]:
    """The same of jaxopt's accelerated proximal gradient method, whose values cannot be seen."""
    problem = known.problem
    prox = lambda v, _, step=1.0: v if problem.prox is None else problem.prox(v, step)
    solver = jaxopt.ProximalGradient(
        problem.loss, prox, acceleration=True, tol=0, maxiter=STEPS, implicit_diff=False
    )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del updates, extra_args
        new, state = solver.update(params, state, None)
        return new - params, state

    init = lambda params: solver.init_state(params, None)
    row = evaluations(known, optax.GradientTransformationExtraArgs(init, update))
    return row | {"values": [None, None]}


def measure(jaxopt: Any, name: str) -> list[dict[str, Any]]:
    """One row for each method that can solve the problem."""
    known = problems.suite()[name]()
    prox = known.problem.prox
    methods = {
        REFERENCE: nag_jax.fista(1 / known.curvature, prox),
        OURS: nag_jax.backtracking(prox),
    }
    if prox is None:
        methods |= {"AdaNAG": nag_jax.adanag(), "optax.lbfgs": optax.lbfgs()}
    rows = {method: evaluations(known, tx) for method, tx in methods.items()}
    rows["jaxopt, accelerated"] = of_jaxopt(jaxopt, known)
    return [{"problem": name, "method": method, **row} for method, row in rows.items()]


def ratios(rows: list[dict[str, Any]], method: str, steps: int = STEPS) -> np.ndarray:
    """Gradients over those of the reference; what did not arrive counts as all of ``steps``."""
    count = {(row["problem"], row["method"]): row["gradients"] for row in rows}
    names = dict.fromkeys(row["problem"] for row in rows if row["method"] == method)
    pairs = [(count[n, method], count[n, REFERENCE]) for n in names]
    filled = np.array([[[g or steps for g in row] for row in pair] for pair in pairs])
    return filled[:, 0] / filled[:, 1]


def summary(results: dict[str, Any]) -> str:
    """Gradients of each method relative to the reference, over all problems and both gaps."""
    rows = results["rows"]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        r = ratios(rows, method)
        body.append([method, len(r), f"{np.median(r):.2f}", f"{r.max():.2f}",
                     f"{np.sum(r < 1)} of {r.size}"])  # fmt: skip
    head = ["method", "problems", "median ratio", "largest", "fewer gradients"]
    return markdown(head, body)


def table(results: dict[str, Any]) -> str:
    """The summary, and the counts on each problem."""
    rows = results["rows"]
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {(row["problem"], row["method"]): row for row in rows}
    body = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        cells = [
            per_gap(found[problem, m]["gradients"]) if (problem, m) in found else ""
            for m in methods
        ]
        body.append([problem, *cells, per_gap(found[problem, OURS]["values"])])
    head = ["problem", *methods, f"values of {OURS}"]
    steps = f"At most {results['steps']:,} steps; a run that does not arrive counts as that many"
    return f"{source(results)} {steps}.\n\n{summary(results)}\n\n{markdown(head, body)}"


def main() -> None:
    jaxopt = importlib.import_module("jaxopt")
    jax.config.update("jax_enable_x64", True)
    results = {
        **describe_machine("benchmarks.stepsizes", ("jax", "optax", "jaxopt", "scikit-learn")),
        "steps": STEPS,
        "rows": [row for name in problems.suite() for row in measure(jaxopt, name)],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_section("stepsizes", table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
