"""Compares optimizers with nothing to tune to tuned ones: accuracy and steps on three small tasks.

``python -m benchmarks.auto`` runs what is missing in results/auto.jsonl (which is not committed),
summarizes it in results/auto.json and writes the table in README.md; ``--tasks``, ``--methods``,
``--seeds`` and ``--seconds`` run a part.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import candidates
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source, write_section
from configs import cnn, mlp, rnn
from examples.trainer.compiling import jit
from examples.trainer.data import datasets
from examples.trainer.tasks.choose import make_task

HERE = Path(__file__).parent
RUNS = HERE / "results" / "auto.jsonl"
SUMMARY = HERE / "results" / "auto.json"
SEEDS = range(3)
LONGER = ("nag", "nag_auto")  # what the question is about
MORE_SEEDS = {"mlp": range(10), "cnn": range(6), "gru": range(6)}
LOSS, LONGEST = 0.3, 1.25  # what counts as being as good as tuned nag: points, ratio of steps


class Problem(NamedTuple):
    """A task at the size at which it is run here."""

    config: Any
    train: dict[str, jax.Array]
    test: dict[str, jax.Array]
    dataset: datasets.Dataset
    every: int  # steps between evaluations
    curve: int  # test samples of those evaluations
    rates: tuple[float, ...]  # of nag's grid
    adam_rates: tuple[float, ...]


def digits() -> Problem:
    """The MLP recipe as it is."""
    config = mlp.get_config()
    return _problem(config, datasets.load(config), 2, 360, _grid(0.005, 9), _grid(0.0005, 7))


def images() -> Problem:
    """The CNN recipe on 24,000 images of 14 x 14 pixels, 8 and 16 channels, 4 epochs."""
    config: Any = cnn.get_config()
    config.augment.update(flip=False, shift=0, zoom=0.0)
    config.model.update(channels=(8, 16), hidden=64)
    config.num_epochs = 4
    dataset = halved(datasets.load(config), 24000, 10000)
    return _problem(config, dataset, 6, 2000, _grid(0.005, 8), _grid(0.0005, 7))


def halved(whole: datasets.Dataset, train_samples: int, test_samples: int) -> datasets.Dataset:
    """The first images of 28 x 28 pixels, at half the resolution."""
    half = lambda x: x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)).astype(np.uint8)
    shrunk = lambda split, n: dict(x=half(split["x"][:n]), y=split["y"][:n])
    train, test = shrunk(whole.train, train_samples), shrunk(whole.test, test_samples)
    return whole._replace(
        train=train, test=test, mean=float(train["x"].mean()), std=float(train["x"].std())
    )


def text() -> Problem:
    """The GRU recipe with 64 units and windows of 32 characters, 2 epochs."""
    config: Any = rnn.get_config()
    config.model.update(hidden=64, embedding=32, length=32)
    config.num_epochs = 2
    return _problem(config, datasets.load(config), 10, 500, _grid(0.125, 8), _grid(0.001, 7))


PROBLEMS: dict[str, Callable[[], Problem]] = {"mlp": digits, "cnn": images, "gru": text}


def _problem(config: Any, dataset: datasets.Dataset, *rest: Any) -> Problem:
    put = functools.partial(jax.tree.map, jnp.asarray)
    return Problem(config, put(dataset.train), put(dataset.test), dataset, *rest)


def _grid(first: float, count: int) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(count))


class Trainer:
    """Compiles one method on one task; its hyperparameters are arguments of the program."""

    def __init__(self, name: str, method: candidates.Method):
        self.problem, self.method = PROBLEMS[name](), method
        config = self.problem.config
        self.samples = len(self.problem.train["x"])
        self.epoch = self.samples // config.batch_size
        self.total = self.epoch * config.num_epochs
        self.recipe = candidates.Recipe(
            total=self.total,
            warmup=round(config.warmup_epochs * self.epoch),
            clip=config.clip_norm,
            weight_decay=config.weight_decay,
            convention=config.optimizer.convention,
        )
        self.task: Any = make_task(config, self.problem.dataset, jax.random.key(0))
        compiled = functools.partial(jit, fusions=config.cpu_fusions)
        self.step = compiled(self._one)
        self.many = compiled(
            lambda carry, hyper, orders: jax.lax.scan(
                lambda carry, order: (self._one(carry, hyper, order), None), carry, orders
            )[0]
        )
        self.start = compiled(lambda params, hyper: self._optimizer(hyper).init(params))
        self.correct = compiled(self._correct)

    def _optimizer(self, hyper: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        return candidates.with_recipe(self.method, self.recipe, hyper)

    def _one(self, carry: Any, hyper: dict[str, Any], order: jax.Array) -> Any:
        params, state = carry
        batch = jax.tree.map(lambda x: x[order], self.problem.train)

        def loss(params: Any) -> jax.Array:
            total, (_, sums) = self.task.losses(params, self.task.rest, batch)
            return total / sums["samples"]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = self._optimizer(hyper).update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    def _correct(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = self.task.model(params, self.task.rest, train=False)
        if "y" in batch:
            return jnp.mean(self.task.logits(model, batch["x"]).argmax(-1) == batch["y"])
        codes = batch["x"]
        logits, _ = model(codes[:, :-1], model.initial_state(len(codes)))
        return jnp.mean(logits.argmax(-1) == codes[:, 1:])

    def accuracy(self, carry: Any, count: int | None = None, at_params: bool = False) -> float:
        """Percent on the first ``count`` test samples, at the iterate the method evaluates."""
        params, state = carry
        params = params if at_params else self.method.evaluate(params, state)
        test = jax.tree.map(lambda x: x[:count], self.problem.test)
        size = min(len(test["x"]), 2000)
        parts = range(0, len(test["x"]) // size * size, size)
        batches = [jax.tree.map(lambda x: x[i : i + size], test) for i in parts]  # noqa: B023
        return 100 * float(np.mean([self.correct(params, batch) for batch in batches]))

    def run(self, seed: int, hyper: dict[str, float]) -> dict[str, Any]:
        begin = time.perf_counter()
        task = make_task(self.problem.config, self.problem.dataset, jax.random.key(seed))
        hyper = {name: jnp.float32(value) for name, value in hyper.items()}
        carry: Any = task.params, self.start(task.params, hyper)
        random = np.random.default_rng(seed)
        orders = [
            random.permutation(self.samples)[: self.epoch * self.problem.config.batch_size]
            for _ in range(self.problem.config.num_epochs)
        ]
        orders = jnp.asarray(np.concatenate(orders).reshape(self.total, -1))
        curve, rates, step = [], [], 0
        while step < self.total:
            part = orders[step : step + self.problem.every]
            if self.problem.config.scan:
                carry = self.many(carry, hyper, part)
            else:
                for order in part:
                    carry = self.step(carry, hyper, order)
            step += len(part)
            # Later points only show how the curve continues.
            if step <= self.total // 2 or step % (4 * self.problem.every) == 0:
                curve.append((step, round(self.accuracy(carry, self.problem.curve), 2)))
                rate = optax.tree.get_all_with_path(carry[1], "learning_rate")
                rates.append(float(f"{float(rate[0][1]):.3g}") if rate else None)
        return {
            "accuracy": self.accuracy(carry),
            "accuracy_at_params": self.accuracy(carry, at_params=True),
            "curve": curve,
            "rates": rates if rates[0] is not None else None,
            "seconds": round(time.perf_counter() - begin, 1),
        }


def default_seeds(task: str, method: str) -> range:
    return MORE_SEEDS[task] if method in LONGER else SEEDS


def wanted(task: str, names: list[str], seeds: list[int] | None) -> list[tuple[str, Any, int]]:
    """Every (method, hyperparameters) and seed, those of one method one after the other."""
    problem = PROBLEMS[task]()
    grids = {"rate": problem.rates, "adam_rate": problem.adam_rates, "momentum": (0.9, 0.95)}
    rows = []
    for name in names:
        spaces = [
            [(key.removeprefix("adam_"), value) for value in grids[key]]
            for key in candidates.METHODS[name].tuned
        ]
        each = default_seeds(task, name) if seeds is None else seeds
        rows += [(name, dict(p), seed) for p in itertools.product(*spaces) for seed in each]
    return rows


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task and method: its best hyperparameters, compared with the best nag."""
    rows = []
    for task in PROBLEMS:
        best: dict[str, list[dict[str, Any]]] = {}
        keyed = [(r["method"], json.dumps(r["hyper"]), r) for r in runs if r["task"] == task]
        for (name, _), group in itertools.groupby(
            sorted(keyed, key=lambda k: (*k[:2], k[2]["seed"])), key=lambda k: k[:2]
        ):
            same = [run for *_, run in group]
            if name not in best or _mean(same) > _mean(best[name]):
                best[name] = same
        tuned = best["nag"]
        # On the samples of the curve; its last evaluation is at most 16 steps before the end.
        target = 0.95 * float(np.mean([run["curve"][-1][1] for run in tuned]))
        for name in candidates.METHODS:
            if name in best:
                rows.append(_row(task, name, best[name], tuned, target))
    return rows


def _mean(runs: list[dict[str, Any]]) -> float:
    return float(np.mean([run["accuracy"] for run in runs]))


def _row(task: str, name: str, runs: Any, nag: Any, target: float) -> dict[str, Any]:
    """The comparison with the tuned nag of the same seeds."""
    tuned = [run for run in nag if run["seed"] in {run["seed"] for run in runs}]
    reach: Any = lambda run: next((step for step, value in run["curve"] if value >= target), None)
    steps, reference = [reach(run) for run in runs], [reach(run) for run in tuned]
    ratio = None
    if None not in steps and None not in reference:
        ratio = round(sum(steps) / len(steps) / (sum(reference) / len(reference)), 2)
    return {
        "task": task,
        "method": name,
        "hyper": runs[0]["hyper"],
        "date": max(run["date"] for run in runs),
        "seeds": len(runs),
        "accuracy": round(_mean(runs), 2),
        "difference": round(_mean(runs) - _mean(tuned), 2),
        "each": [round(run["accuracy"], 2) for run in runs],
        "steps": steps,
        "ratio": ratio,
    }


def passes(row: dict[str, Any]) -> bool:
    """As good as tuned nag: at most LOSS points less accurate, at most LONGEST times the steps."""
    return row["difference"] >= -LOSS and row["ratio"] is not None and row["ratio"] <= LONGEST


def table(results: dict[str, Any]) -> str:
    """Accuracy, difference to tuned nag and ratio of steps, for each task."""
    found = {(row["method"], row["task"]): row for row in results["rows"]}
    body, good = [], []
    for name, method in candidates.METHODS.items():
        rows = [found.get((name, task)) for task in PROBLEMS]
        if any(rows):
            body.append([name, *map(_cell, rows)])
        if not method.tuned and all(row and passes(row) for row in rows):
            good.append(f"`{name}`")
    seeds = "; ".join(f"{task} {len(MORE_SEEDS[task])}" for task in PROBLEMS)
    three = [
        f"{row['task']} {row['difference']:+.2f}"
        for row in results["rows_of_three_seeds"] if row["method"] == "nag_auto"
    ]  # fmt: skip
    table = markdown(["method", *PROBLEMS], body, 1 + len(PROBLEMS))
    return (
        f"{source(results)} `nag` and `nag_auto` have more seeds than the others ({seeds}), which "
        f"have {len(SEEDS)}.\n\n{table}\n\n"
        f"A method without tuning passes if on all tasks it is at most {LOSS} points less accurate "
        f"than tuned nag and needs at most {LONGEST} times the steps. Passed: "
        f"{', '.join(good)}.\nDifference of `nag_auto` with the first {len(SEEDS)} seeds alone: "
        f"{', '.join(three)} points."
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    hyper = ", ".join(f"{value:g}" for value in row["hyper"].values())
    cell = f"{row['accuracy']:.2f} ({row['difference']:+.2f}), {ratio}"
    return f"{cell} [{hyper}]" if hyper else cell


def write(runs: Path) -> None:
    """The summary, and the table between the markers of README.md."""
    found = [json.loads(line) for line in runs.read_text().splitlines()]
    fewer = [run for run in found if run["method"] in LONGER and run["seed"] in SEEDS]
    results = describe_machine("benchmarks.auto", ("jax", "optax", "flax")) | {
        "rows": summarize(found),
        "rows_of_three_seeds": summarize(fewer),
    }
    SUMMARY.write_text(json.dumps(results, indent=1) + "\n")
    write_section("auto", table(results))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="*", default=list(candidates.METHODS))
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    parser.add_argument("--runs", type=Path, default=RUNS)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    arguments.runs.touch()
    known = [json.loads(line) for line in arguments.runs.read_text().splitlines()]
    key = lambda row: json.dumps([row[name] for name in ("task", "method", "hyper", "seed")])
    done = {key(row) for row in known}
    for task in arguments.tasks:
        trainer = None
        for name, hyper, seed in wanted(task, arguments.methods, arguments.seeds):
            row = {"task": task, "method": name, "hyper": hyper, "seed": seed}
            if key(row) in done:
                continue
            if time.monotonic() > end:
                raise SystemExit(3)
            if trainer is None or trainer.method is not candidates.METHODS[name]:
                trainer = Trainer(task, candidates.METHODS[name])
            row |= trainer.run(seed, hyper) | {"date": date.today().isoformat()}
            with arguments.runs.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(task, name, hyper, seed, f"{row['accuracy']:.2f}", row["seconds"], flush=True)
    write(arguments.runs)


if __name__ == "__main__":
    main()
