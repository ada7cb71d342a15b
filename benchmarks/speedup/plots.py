"""The plots of the READMEs, into docs/img."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.speedup import cells, report
from benchmarks.speedup.optimizers import NEWER, OPTIMIZERS

COLORS = {
    "sgd": "tab:gray", "heavy_ball": "tab:orange", "nag": "tab:cyan", "nag_sutskever": "tab:blue",
    "adam": "tab:red", "adamw": "tab:pink", "nadam": "tab:brown", "nag_auto": "tab:green",
    "muon_nesterov": "navy", "fista": "tab:olive", "fista_restart": "tab:purple",
    "backtracking": "black",
}  # fmt: skip
BOTH = {"nag_sutskever": "NAG, both conventions"}  # the same while all is constant
FLOOR = 1e-5  # of the start: float32 sees no smaller differences of losses
mpl.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})


def draw(results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """All plots for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if any(name in results for name in cells.QUADRATICS):
        figures["speedup_kappa"] = kappas(results)
    if any(name in results for name in cells.tasks.TASKS):
        figures["speedup_curves"] = loss_curves(results)
    if cells.MAP in results:
        figures["speedup_stability"] = stability(results[cells.MAP])
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    return paths


def kappas(results: dict[str, dict[str, Any]]) -> Figure:
    """Steps to 1e-6 of the start against the condition number, and the slopes of the theory."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    found = {cells.QUADRATICS[n]: results[n] for n in cells.QUADRATICS if n in results}
    x = np.array(list(found), float)
    for key in COLORS:
        steps = [report.quadratic_steps(r, key) for r in found.values() if key in r["rows"]]
        if key == "nag" or len(steps) < len(found):
            continue
        # Where a seed did not arrive there is no point, and no line through it.
        mean = np.array([np.nan if s.mean is None else s.mean for s in steps])
        each = np.array([s.each for s in steps], float)
        bars = [mean - each.min(1), each.max(1) - mean]
        label = BOTH.get(key, OPTIMIZERS[key].title)
        axes.errorbar(x, mean, bars, label=label, color=COLORS[key], marker="o", ms=3, lw=1.2)
    # Above and below what was measured, with the text on the free side.
    for key, power, factor, text in (("sgd", 1.0, 1.6, "κ"), ("nag_sutskever", 0.5, 0.35, "√κ")):
        middle = list(found)[len(found) // 2]
        at = report.quadratic_steps(found[middle], key).mean
        if at is not None:
            line = factor * at * (x / middle) ** power
            axes.plot(x, line, "k:", lw=0.8)
            side, offset = ("right", (-8, 4)) if factor > 1 else ("left", (8, -8))
            axes.annotate(f"slope of {text}", (middle, factor * at), offset, ha=side,
                          textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="condition number κ")
    axes.set_ylabel("steps until f is 1e-6 of its start")
    lines, labels = axes.get_legend_handles_labels()
    last = lambda i: -float(np.nan_to_num(lines[i].lines[0].get_ydata()[-1]))
    order = sorted(range(len(lines)), key=last)  # as on the right edge
    figure.legend([lines[i] for i in order], [labels[i] for i in order], loc="outside right center")
    return figure


def loss_curves(results: dict[str, dict[str, Any]]) -> Figure:
    """Mean training loss of three seeds, each optimizer tuned, and the range over them."""
    names = [name for name in cells.tasks.TASKS if name in results]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _curves(axes, results[name])
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(names)]:
        handles |= {line.get_label(): line for line in axes.get_lines()}
    spare = lines * columns > len(names)  # a legend fits where no axes are
    figure.legend(
        handles.values(), handles.keys(), ncol=2 if spare else 6,
        loc="lower right" if spare else "outside lower center",
    )  # fmt: skip
    return figure


def _curves(axes: Axes, result: dict[str, Any]) -> None:
    """The training loss, above its minimum where that is known."""
    points, low = np.array(result["points"])[1:], result.get("low") or 0.0
    start = np.mean([c[0] for c in result["rows"]["sgd"]["curves"]]) - low
    least = start
    for key in COLORS:
        best = report.best_of(result, key)
        if best is None or key == "nag":
            continue
        curves = result["rows"][best]["curves"]
        filled = np.array([[np.nan if v is None else v - low for v in c[1:]] for c in curves])
        filled = np.maximum(filled, FLOOR * start)
        label = (OPTIMIZERS | NEWER)[key].title
        axes.plot(points, filled.mean(0), color=COLORS[key], label=label, lw=1)
        axes.fill_between(points, filled.min(0), filled.max(0), color=COLORS[key], alpha=0.15, lw=0)
        least = min(least, np.nanmin(filled))
    axes.set(xscale="log", yscale="log", title=result["title"], xlabel="steps")
    axes.set_ylabel("training loss - minimum" if low else "training loss")
    axes.set_ylim(0.8 * float(least), 1.5 * float(start))
    if least > 0.01 * start:  # too few powers of ten
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def stability(result: dict[str, Any]) -> Figure:
    """log10 of f on a quadratic over learning rate and momentum, and the limit of the theory."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    rates, momenta = (np.array(result["settings"][k]) for k in ("rates", "momenta"))
    grid = figure.subplots(1, len(result["rows"]), sharey=True, squeeze=False)
    image = None
    for axes, (key, row) in zip(grid.flat, result["rows"].items(), strict=True):
        values = np.array([[np.nan if v is None else v for v in r] for r in row["log10"]])
        values = np.where(values >= 0, np.nan, values)
        axes.set_facecolor("mistyrose")
        image = axes.pcolormesh(rates, momenta, values, vmin=-16, vmax=0, cmap="viridis")
        axes.plot(report.limits(key, momenta), momenta, "r", lw=1.5, label="theory's limit")
        title = BOTH["nag_sutskever"] if key == "nag" else row["title"]
        axes.set(title=title, xlabel="learning rate · L", xlim=(rates[0], rates[-1]))
        axes.grid(visible=False)
        axes.legend(fontsize=7, loc="upper right")
    grid[0, 0].set_ylabel("momentum")
    if image is not None:
        steps = result["settings"]["steps"]
        figure.colorbar(image, ax=grid, label=f"log10 f after {steps} steps (pink: diverged)")
    return figure
