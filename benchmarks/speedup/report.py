"""Steps to a target compared with tuned SGD, and the tables of the pages.

The targets come from tuned SGD with the same seed, and so the same start and batches: the training
loss at which 95 % of its decrease is done, its final loss, and 95 % of its final accuracy.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.readme import markdown, source
from benchmarks.speedup import cells
from benchmarks.speedup.optimizers import OPTIMIZERS
from benchmarks.speedup.training import steps_to_gap
from nag_jax import rules

SHARE = 0.95
Rows = dict[str, dict[str, Any]]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files that are there, by task."""
    paths = {name: folder / f"{name}.json" for name in cells.NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


class Steps(NamedTuple):
    """Of each seed until a target; None: not within the run."""

    each: list[int | None]

    @property
    def mean(self) -> float | None:
        reached = [n for n in self.each if n is not None]
        return float(np.mean(reached)) if len(reached) == len(self.each) else None

    def __str__(self) -> str:
        if self.mean is None:
            count = sum(n is not None for n in self.each)
            return f"- ({count} of {len(self.each)})" if count else "-"
        low, high = min(filter(None, self.each)), max(filter(None, self.each))
        return f"{self.mean:.0f}" if low == high else f"{self.mean:.0f} ({low} to {high})"


def to_loss(result: dict[str, Any], key: str, share: float = SHARE, base: str = "sgd") -> Steps:
    """Steps until ``share`` of the decrease of the training loss of tuned ``base`` is done."""
    targets = [(1 - share) * c[0] + share * c[-1] for c in result["rows"][base]["curves"]]
    return _first(result["points"], result["rows"][key]["curves"], targets, np.less_equal)


def to_gap(result: dict[str, Any], key: str) -> Steps:
    """Steps until the loss is within 1e-4 of its known minimum, in units of the start."""
    points, curves = result["points"], result["rows"][key]["curves"]
    return Steps([steps_to_gap(points, curve, result["low"]) for curve in curves])


def to_score(result: dict[str, Any], key: str) -> Steps:
    """Steps until 95 % of tuned SGD's accuracy at the end, each tuned for accuracy."""
    targets = [SHARE * scores[-1] for scores in result["rows"]["sgd"]["scores"]]
    return _first(result["points"], result["rows"][key]["scores"], targets, np.greater_equal)


def _first(points: list[int], curves: list[list[Any]], targets: list[float], good: Any) -> Steps:
    hits = [
        next((n for n, v in zip(points, curve, strict=True) if v is not None and good(v, t)), None)
        for curve, t in zip(curves, targets, strict=True)
    ]
    return Steps(hits)


def ratio(base: Steps, other: Steps) -> float | None:
    """How many times fewer steps."""
    if base.mean is None or other.mean is None:
        return None
    return base.mean / other.mean


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def spread(values: list[float | None], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    if None in values:
        return "not finite"
    numbers = np.array(values, float)
    deviation = numbers.std(ddof=1) if len(numbers) > 1 else 0.0
    return f"{numbers.mean():.{digits}g} ± {deviation:.1g}"


def chosen(row: dict[str, Any], which: str = "best") -> str:
    if not row["tried"]:
        return ""
    point = row[which]
    second = f", {point['second']:.4g}" if row["second"] else ""
    return f"{point['rate']:.3g}{second}" + ("" if row["inside"] else " (edge)")


def failures(row: dict[str, Any]) -> str:
    """Of the seeds at 2, 4, ... times the best learning rate."""
    return " ".join(map(str, row["failed"][1:]))


def table(result: dict[str, Any]) -> str:
    """One task that is trained on."""
    rows, classes = result["rows"], result["score"] == "accuracy"
    convex = result.get("low") is not None
    head = [
        "optimizer", "rate, momentum", "trials", "training loss", f"test {_name(result)}",
        "steps to 95 %", "vs SGD", "steps to SGD's end",
        *(["steps to a gap of 1e-4"] if convex else []),
        *(["steps to 95 % accuracy"] if classes else []), "ms a step", "s to 95 %", "failed",
    ]  # fmt: skip
    body = []
    for key, row in rows.items():
        steps, end = to_loss(result, key), to_loss(result, key, 1.0)
        ms = row.get("milliseconds")
        seconds = "-" if steps.mean is None or ms is None else f"{steps.mean * ms / 1e3:.2f}"
        body.append(
            [
                row["title"], chosen(row), len(row["tried"]) or "", spread(row["loss"]),
                spread(row["test"]), steps, times(ratio(to_loss(result, "sgd"), steps)), end,
                *([to_gap(result, key)] if convex else []),
                *([to_score(result, key)] if classes else []),
                "" if ms is None else f"{ms:.3g}", seconds, failures(row),
            ]
        )  # fmt: skip
    return markdown(head, body, 2)


def _name(result: dict[str, Any]) -> str:
    return "loss" if result["score"] == "test loss" else result["score"]


def quadratic_steps(result: dict[str, Any], key: str) -> Steps:
    return Steps(result["rows"][key]["steps"])


def quadratic_table(results: dict[str, Any]) -> str:
    """Steps of each optimizer on each quadratic."""
    found = {name: results[name] for name in cells.QUADRATICS if name in results}
    head = ["optimizer", *(name.removeprefix("quadratic_") for name in found)]
    body = []
    for key, optimizer in OPTIMIZERS.items():
        line: list[Any] = [optimizer.title]
        for result in found.values():
            row = result["rows"].get(key)
            point = f" [{chosen(row)}]" if row and row["tried"] else ""
            line.append(f"{quadratic_steps(result, key)}{point}" if row else "")
        body.append(line)
    return markdown(head, body)


def stable(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which points of the map did not diverge: f below its start at the end."""
    filled = lambda rows: np.array([[np.inf if v is None else v for v in r] for r in rows])
    return {key: filled(row["log10"]) < 0 for key, row in result["rows"].items()}


def limits(key: str, momenta: np.ndarray) -> np.ndarray:
    """Learning rates, in units of 1/L, from which on a quadratic diverges."""
    if key == "nag":
        return np.array([rules.stability_limit(mu, mu) for mu in momenta])
    return np.array([rules.stability_limit(mu, 1.0, 0.0) for mu in momenta])  # heavy ball


def map_sentence(result: dict[str, Any]) -> str:
    """How many points of the map are on the side that theory predicts."""
    rates, momenta = (np.array(result["settings"][k]) for k in ("rates", "momenta"))
    parts = []
    for key, found in stable(result).items():
        limit = limits(key, momenta)[:, None]
        clear = np.abs(rates / limit - 1) > 1e-6  # on the limit itself nothing is decided
        agree = (found == (rates < limit)) & clear
        parts.append(f"{result['rows'][key]['title']} {agree.sum()} of {clear.sum()}")
    return "; ".join(parts)


def failure_table(results: dict[str, Any]) -> str:
    """Share of the runs that failed, over all tasks that are trained on."""
    body = []
    for key, optimizer in OPTIMIZERS.items():
        pairs = [(results[n], best_of(results[n], key)) for n in cells.tasks.TASKS if n in results]
        rows = [result["rows"][best] for result, best in pairs if best]
        if optimizer.exact or optimizer.rate is None or not rows:
            continue
        failed = np.array([row["failed"] for row in rows])
        runs = sum(len(row["loss"]) for row in rows)
        body.append([optimizer.title, runs, *(f"{100 * n / runs:.0f} %" for n in failed.sum(0))])
    return markdown(["optimizer", "runs", *(f"{m} x" for m in cells.MULTIPLES)], body)


def source_of(results: dict[str, Any]) -> str:
    any_result = next(iter(results.values()))
    return f"{source(any_result)} Also ran: {any_result['also_ran']}."


def sections(results: dict[str, Any]) -> dict[str, str]:
    """The tables of benchmarks/README.md."""
    trained = [name for name in cells.tasks.TASKS if name in results]
    parts = []
    for name in trained:
        result = results[name]
        parts.append(f"**{result['title']}**: {result['settings']['about']}.\n\n{table(result)}")
    return {
        "speedup quadratics": quadratic_table(results),
        "speedup tasks": "\n\n".join(parts),
    }


def best_of(result: dict[str, Any], optimizer: str) -> str | None:
    """The optimizer's row, the one with the lowest loss where there are several momenta."""
    same = [key for key in result["rows"] if key.partition("@")[0] == optimizer]
    loss = lambda key: np.mean([np.inf if v is None else v for v in result["rows"][key]["loss"]])
    return min(same, key=loss, default=None) if len(same) > 1 else next(iter(same), None)


def momenta_table(result: dict[str, Any]) -> str:
    """Squared error on the test set for each largest momentum, as table 1 of the 2013 paper."""
    rows = result["rows"]
    momenta = [key.partition("@")[2] for key in rows if key.startswith("heavy_ball@")]
    show = lambda key: spread(rows[key]["test_of_best"], 3) if key in rows else ""
    body = [["SGD", show("sgd"), *("" for _ in momenta)]]
    for key in ("heavy_ball", "nag_sutskever"):
        cells_of_row = [show(f"{key}@{momentum}") for momentum in momenta]
        body.append([OPTIMIZERS[key].title, "", *cells_of_row])
    return markdown(["largest momentum", "0", *momenta], body)


def transformer_table(result: dict[str, Any]) -> str:
    """Losses, the rate and the second hyperparameter, and steps to what tuned AdamW reaches."""
    body = [
        [
            row["title"], chosen(row), spread(row["loss"]), spread(row["test"]),
            to_loss(result, key, 1.0, base="adamw"),
        ]
        for key, row in result["rows"].items()
    ]  # fmt: skip
    head = ["optimizer", "tuned", "training loss", "test loss", "steps to AdamW's training loss"]
    return markdown(head, body, 2)


def verdict(results: dict[str, Any]) -> str:
    """How many times fewer steps than tuned SGD, to 95 % of its decrease and to all of it."""
    keys = ("heavy_ball", "nag_sutskever", "adam", "nag_auto")
    head = ["problem", "steps of tuned SGD", "heavy ball", "NAG", "Adam", "nag_auto"]
    body = []
    for name, result in results.items():
        if name == cells.MAP:
            continue
        if name in cells.QUADRATICS:
            looks = [quadratic_steps]
        else:
            looks = [to_loss, lambda result, key: to_loss(result, key, 1.0)]
        bases = [look(result, "sgd") for look in looks]
        show = lambda steps: "-" if steps.mean is None else f"{steps.mean:,.0f}"
        kappa = name.removeprefix("quadratic_")
        title = f"quadratic, κ = {kappa}" if name in cells.QUADRATICS else result["title"]
        line = [title, ", ".join(map(show, bases))]
        for key in keys:
            same = best_of(result, key)
            ratios = [ratio(b, look(result, same)) if same else None
                      for b, look in zip(bases, looks, strict=True)]  # fmt: skip
            line.append(", ".join(map(times, ratios)))
        body.append(line)
    return markdown(head, body)


def accuracies(results: dict[str, Any]) -> str:
    """Test accuracy of the trial that was most accurate on the validation set, three seeds."""
    tasks = [r for r in results.values() if r.get("score") == "accuracy"]
    body = []
    for key, optimizer in OPTIMIZERS.items():
        if not optimizer.exact:
            rows = [r["rows"].get(key) for r in tasks]
            body.append([optimizer.title, *(spread(row["test"]) if row else "" for row in rows)])
    return markdown(["optimizer", *(r["title"] for r in tasks)], body)
