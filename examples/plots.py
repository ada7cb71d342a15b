"""Curves of a run as a PNG."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")


def save_curves(path: Path, history: list[dict[str, float]]) -> None:
    """Draws loss and accuracy of training and test against the epoch into ``path``."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            points = [(row["epoch"], row[f"{split}_{name}"]) for row in history]
            axes.plot(*zip(*points, strict=True), marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=name + (" (%)" if name == "accuracy" else ""))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
