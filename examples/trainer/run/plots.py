"""Plots and tables of a run."""

import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from examples.trainer.cluster import processes
from examples.trainer.cluster.layout import host_copy
from examples.trainer.tasks.adversarial import Adversarial
from examples.trainer.tasks.language import LanguageModel
from examples.trainer.tasks.supervised import Classification
from examples.trainer.tasks.task import Task


def save_curves(path: Path, history: list[dict[str, float]]) -> None:
    """Plots every training and test metric against the epoch."""
    names = {name.split("_", 1)[1] for row in history for name in row if name.startswith("train_")}
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, sorted(names, key=lambda n: (n != "loss", n)), strict=True):
        for split in ("train", "test"):
            points = [(r["epoch"], r[f"{split}_{name}"]) for r in history if f"{split}_{name}" in r]
            if points:
                ax.plot(*zip(*points, strict=True), marker=".", label=split)
        ax.set(xlabel="epoch", ylabel=name.replace("_", " "))
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=120)


def save_progress(workdir: Path, task: Task, params: Any, rest: Any, epoch: int) -> None:
    """What a task shows at each evaluation; a GAN shows images, always from the same noise."""
    if not processes.is_first():
        return
    params, rest = host_copy((params, rest))
    if isinstance(task, Adversarial):
        save_images(workdir / f"generated-{epoch:03d}.png", task, params, rest)


def save_results(workdir: Path, task: Task, params: Any, rest: Any, test: Any) -> None:
    """What a task shows at the end: a confusion matrix or a sample of text."""
    if not processes.is_first():
        return
    params, rest, test = host_copy((params, rest, test))
    if isinstance(task, Classification):
        save_confusion(workdir, task, params, rest, test)
    elif isinstance(task, LanguageModel):
        text = task.sample(params, rest, jax.random.key(0), 400)
        (workdir / "sample.txt").write_text(text)
        print(text)


def save_confusion(
    workdir: Path, task: Classification, params: Any, rest: Any, test: Any, batch_size: int = 1000
) -> None:
    """Writes confusion.png and results.json: confusion matrix and accuracy of each class."""
    model = task.model(params, rest, train=False)
    predict = jax.jit(lambda x: task.logits(model, x).argmax(-1))
    x, y = test["x"], np.asarray(test["y"])
    found = [np.asarray(predict(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
    classes = len(task.names)
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (y, np.concatenate(found)), 1)
    per_class = 100 * matrix.diagonal() / np.maximum(matrix.sum(1), 1)
    accuracies = dict(zip(task.names, per_class.round(2).tolist(), strict=True))
    results = {"class_accuracy": accuracies, "confusion": matrix.tolist()}
    (workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    ax = figure.subplots()
    ax.imshow(matrix, cmap="Blues", norm="symlog")
    for (i, j), count in np.ndenumerate(matrix):
        dark = count > 0.2 * matrix.max()
        ax.text(j, i, count, ha="center", va="center", size=7, color="w" if dark else "k")
    ax.set_xticks(range(classes), task.names, rotation=45, ha="right")
    ax.set_yticks(range(classes), task.names)
    ax.set(xlabel="predicted", ylabel="true", title=f"accuracy {matrix.trace() / matrix.sum():.2%}")
    figure.savefig(workdir / "confusion.png", dpi=120)
    print("accuracy by class: " + ", ".join(f"{n} {a:.1f}" for n, a in accuracies.items()))


def save_images(path: Path, task: Adversarial, params: Any, rest: Any, side: int = 8) -> None:
    """A grid of generated images, always from the same noise."""
    images = np.asarray(task.generate(params, rest, jax.random.key(0), side**2))
    _, height, width, depth = images.shape
    grid = images.reshape(side, side, height, width, depth).swapaxes(1, 2)
    grid = grid.reshape(side * height, side * width, depth)
    matplotlib.image.imsave(path, grid if depth == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=1)
