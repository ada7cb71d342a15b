"""Samples per second of the example trainer's own loop against the same program in PyTorch.

``python -m benchmarks.throughput`` trains each model with both, in turn, in one process, and writes
benchmarks/results/throughput.json: medians and the ratio. The PyTorch program keeps its data in
memory, takes batches by index, and counts loss and accuracy on the device as the trainer does.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.machine import describe_machine
from examples.trainer.cluster.layout import Layout
from examples.trainer.cluster.signals import StopRequest
from examples.trainer.data import datasets
from examples.trainer.loop import feeds, steps, train
from examples.trainer.optimizer import make_optimizer
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.choose import make_task

_RESULT = Path(__file__).parent / "results" / "throughput.json"


def prepared(config: Any, dataset: datasets.Dataset) -> tuple[feeds.MemoryFeed, TrainState]:
    """The trainer's feed with its compiled update, and the state to begin with."""
    layout = Layout(config.devices)
    feed = feeds.MemoryFeed(config, dataset, layout)
    task = make_task(config, dataset, jax.random.key(0))
    maker = make_optimizer(config, feed.steps_per_epoch, 10**6)
    feed.compile(steps.make_update(task, maker.transformation, 1, layout))
    state = steps.initial_state(task, maker.transformation, jax.random.key(1), feed.samples)
    return feed, layout.put_whole(state)


def jax_runner(config: Any, dataset: datasets.Dataset) -> Callable[[int], None]:
    """``run(n)`` makes n updates through the trainer's feed and waits for the device."""
    feed, state = prepared(config, dataset)
    position = 0

    def run(n: int) -> None:
        nonlocal state, position
        for _ in range(n if feed.stride else 1):
            state = feed.advance(state, position, feed.stride or n)
            position += feed.stride or n
        jax.block_until_ready(state)

    return run


class TorchGRU(nn.Module):
    def __init__(self, symbols: int, embedding: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(symbols, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.logits = nn.Linear(hidden, symbols)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.gru(self.embed(x))[0])


def torch_model(config: Any, dataset: datasets.Dataset) -> nn.Module:
    model, outputs = config.model, len(dataset.names)
    if model.name == "gru":
        return TorchGRU(outputs, model.embedding, model.hidden)
    height, width, depth = dataset.train["x"].shape[1:]
    if model.name == "mlp":
        sizes = [height * width * depth, *model.hidden_sizes]
        hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))
    first, second = model.channels
    return nn.Sequential(
        nn.Conv2d(depth, first, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(second * (height // 4) * (width // 4), model.hidden), nn.ReLU(),
        nn.Linear(model.hidden, outputs),
    )  # fmt: skip


def torch_runner(config: Any, dataset: datasets.Dataset) -> Callable[[int], None]:
    model = torch_model(config, dataset)
    decay, rate = config.weight_decay, config.learning_rate / 100
    sgd = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=config.momentum, nesterov=True,
        weight_decay=decay, foreach=True,
    )  # fmt: skip
    text = config.task == "language"
    x = torch.from_numpy(np.ascontiguousarray(dataset.train["x"])).long() if text else (
        torch.tensor(dataset.train["x"]).permute(0, 3, 1, 2).contiguous()
    )  # fmt: skip
    y = None if text else torch.from_numpy(dataset.train["y"]).long()
    order, position = torch.randperm(len(x)), 0
    totals = torch.zeros(2)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal order, position
        if position + config.batch_size > len(x):
            order, position = torch.randperm(len(x)), 0
        indices = order[position : position + config.batch_size]
        position += config.batch_size
        if y is None:
            windows = x[indices]
            return windows[:, :-1], windows[:, 1:].reshape(-1)
        return (x[indices].float() - dataset.mean) / dataset.std, y[indices]

    def run(n: int) -> None:
        for _ in range(n):
            inputs, targets = batch()
            sgd.zero_grad()
            logits = model(inputs)
            logits = logits.reshape(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(logits, targets)
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            sgd.step()
            totals[0] += loss.detach()
            totals[1] += (logits.detach().argmax(-1) == targets).float().mean()

    return run


def python_overhead(config: Any, dataset: datasets.Dataset, n: int = 2000) -> dict[str, float]:
    """Milliseconds a step of the trainer's loop beyond the bare jitted call, on a tiny model."""
    feed, state = prepared(config, dataset)
    order = steps.epoch_order(state.key, 0, len(feed.samples["x"]))
    state = feed.advance(state, 0, 1)
    times: dict[str, list[float]] = {"bare": [], "loop": []}
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(n):
            state = feed._run(state, feed.samples, order, 1)
        jax.block_until_ready(state)
        times["bare"].append(time.perf_counter() - start)
        stop, step = StopRequest(), 0
        start = time.perf_counter()
        while step < n:
            end = train.next_stop(config, step, feed.steps_per_epoch, n)
            state, step, _ = train.update_until(end, feed, state, step, stop)
        jax.block_until_ready(state)
        times["loop"].append(time.perf_counter() - start)
        stop.uninstall()
    per_step = {name: 1e3 * min(values) / n for name, values in times.items()}
    return per_step | {"overhead_ms": per_step["loop"] - per_step["bare"]}


RECIPES = {
    "mlp": dict(name="mlp", steps=400, changes={}),
    "mlp on Fashion-MNIST": dict(name="mlp", steps=200, changes=dict(dataset="fashion_mnist")),
    "cnn": dict(name="cnn", steps=20, changes=dict(augment=dict(flip=False, shift=0, zoom=0.0))),
    "rnn": dict(name="rnn", steps=20, changes={}),
}
RUNNERS = {"nag_jax": jax_runner, "torch": torch_runner}


def configured(model: str) -> Any:
    config = import_module(f"configs.{RECIPES[model]['name']}").get_config()
    config.update(RECIPES[model]["changes"])
    return config


def work(pipe: Any, framework: str, model: str) -> None:
    """A separate process for each framework: their idle threads would slow each other down."""
    torch.manual_seed(0)
    config = configured(model)
    run = RUNNERS[framework](config, datasets.load(config))
    steps_per_round = RECIPES[model]["steps"]
    run(steps_per_round)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        run(steps_per_round)
        pipe.send(steps_per_round * config.batch_size / (time.perf_counter() - start))


def compare(model: str, rounds: int) -> dict[str, Any]:
    """Both frameworks in turn, so that a drift of the machine meets both."""
    context = multiprocessing.get_context("spawn")
    pipes, speeds = {}, {name: [] for name in RUNNERS}
    for name in RUNNERS:
        pipes[name], other = context.Pipe()
        context.Process(target=work, args=(other, name, model), daemon=True).start()
        pipes[name].recv()  # warm, before anything is timed
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            speeds[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    ratios = [a / b for a, b in zip(speeds["nag_jax"], speeds["torch"], strict=True)]
    return {
        "samples_per_second": {name: round(statistics.median(v)) for name, v in speeds.items()},
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The trainer's speed compared with PyTorch's.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--also_ran", default="nothing else", help="for the result file")
    arguments = parser.parse_args()
    # Those of models that are not measured now stay.
    results: dict[str, Any] = json.loads(_RESULT.read_text())["results"] if _RESULT.exists() else {}
    for model in arguments.models:
        results[model] = compare(model, arguments.rounds)
        print(model, results[model], flush=True)
    config = import_module("configs.cnn").get_config()
    config.update(dict(dataset="digits", batch_size=8, model=dict(channels=(2, 2), hidden=4)))
    config.update(dict(augment=dict(flip=False, shift=0, zoom=0.0)))
    results["python_overhead"] = python_overhead(config, datasets.load(config))
    print(results["python_overhead"])
    report = describe_machine("benchmarks.throughput", ("jax", "flax", "torch"))
    report |= {"also_ran": arguments.also_ran, "results": results}
    _RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
