"""DiLoCo against training that averages every gradient: loss and traffic, both tuned alike.

    python -m benchmarks.diloco [--inner NAG AdamW Muon] [--processes 2] [--quick]

A character GRU is trained by eight workers, each on its own part of the text. Learning rates, and
the outer learning rate and momentum, are searched for on a validation set with one seed. The best
setting is then trained with three seeds and evaluated on the test set. Each finished search and
each finished setting is a row of results/diloco.json; existing rows are not run again.
"""

import argparse
import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks.machine import ENVIRONMENT, describe_machine
from configs import diloco as recipe
from examples.trainer.compiling import jit
from examples.trainer.data import datasets
from examples.trainer.diloco.workers import AXIS, make_rounds, over_workers
from examples.trainer.tasks.choose import make_task

RESULTS = Path(__file__).parent / "results" / "diloco.json"
INNER: dict[str, tuple[Callable[[Any], optax.GradientTransformation], float]] = {
    # with the learning rate at which the search begins
    "NAG": (lambda rate: nag_jax.nag(rate, 0.9, convention="sutskever"), 1.0),
    "AdamW": (lambda rate: optax.adamw(rate, weight_decay=0.0), 0.01),
    "Muon": (lambda rate: optax.contrib.muon(rate, adam_learning_rate=rate), 0.01),
}
PERIODS = (0, 8, 32, 128)  # 0: every gradient is averaged
SENT = {"float32": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8, "int4": jnp.int4}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}
WORKERS, BATCH, WARMUP, STEPS, VALID = 8, 8, 128, 1792, 1024
SEEDS = 0, 1, 2
FIRST = 32  # the period whose best setting is where the searches of the others begin
TRIALS = {FIRST: 16}  # of a search at most
OTHERS = 10
LADDERS = {
    "rate": tuple(2 ** (i / 2) for i in range(-12, 13)),  # in units of INNER's
    "outer_rate": (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0),
    "outer_momentum": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
MIDDLE = {"rate": 12, "outer_rate": 3, "outer_momentum": 5}


class Setting(NamedTuple):
    """What is tuned."""

    rate: float  # peak learning rate of the inner optimizer
    outer_rate: float
    outer_momentum: float


class Trainer:
    """Trains the model with one inner optimizer and one period; settings are arguments."""

    def __init__(self, inner: str, every: int, sent: str = "float32", quick: bool = False):
        config: Any = recipe.get_config()
        dataset = datasets.load(config)
        x = dataset.train["x"]
        self.every, self.steps = every, 128 if quick else STEPS
        self.share = (len(x) - VALID) // WORKERS
        self.samples = {"x": x[: self.share * WORKERS].reshape(WORKERS, self.share, -1)}
        self.valid, self.test = x[-VALID:], dataset.test["x"]
        self.make_task = lambda seed: make_task(config, dataset, jax.random.key(seed))
        self.task: Any = self.make_task(0)
        self.parameters = sum(p.size for p in jax.tree.leaves(self.task.params))
        make, self.middle = INNER[inner]
        compiled = functools.partial(jit, fusions=config.cpu_fusions)
        self.train = compiled(functools.partial(self._train, make, SENT[sent]))
        self.loss = compiled(self._loss)

    def _train(
        self, make: Callable, sent: Any, setting: Setting, params: Any, samples: Any, order: Any
    ) -> Any:
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, WARMUP, self.steps)
        optimizer = make(lambda step: setting.rate * shape(step))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
        if self.every:
            more = {} if sent is None else {"send_dtype": sent}
            outer = setting.outer_rate, setting.outer_momentum
            optimizer = nag_jax.diloco(optimizer, AXIS, *outer, every=self.every, **more)
        optimizer = optax.with_extra_args_support(optimizer)
        copies = lambda x: jnp.stack([x] * WORKERS)
        state = jax.tree.map(copies, (params, optimizer.init(params)))
        rounds = make_rounds(self.task, optimizer, synchronous=not self.every)
        params, opt_state = over_workers(rounds, "vmap", WORKERS)(*state, samples, order)
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        return nag_jax.eval_params(first(params), first(opt_state))

    def _loss(self, params: Any, x: jax.Array) -> jax.Array:
        """In nats per character."""
        total, (_, sums) = self.task.losses(params, self.task.rest, {"x": x})
        return total / sums["samples"]

    def run(self, setting: Setting, seed: int) -> tuple[float, float]:
        """The losses on the validation and the test set, infinite after a divergence."""
        rng = np.random.default_rng(seed)
        per_epoch = self.share // BATCH
        epoch = lambda: rng.permutation(self.share)[: per_epoch * BATCH].reshape(-1, BATCH)
        epochs = range(math.ceil(self.steps / per_epoch))
        each = [np.concatenate([epoch() for _ in epochs])[: self.steps] for _ in range(WORKERS)]
        order = np.stack(each).astype(np.int32).reshape(WORKERS, -1, self.every or 128, BATCH)
        params = self.train(
            jax.tree.map(jnp.float32, setting), self.make_task(seed).params, self.samples, order
        )
        valid, test = (float(self.loss(params, x)) for x in (self.valid, self.test))
        return (valid, test) if math.isfinite(valid) else (math.inf, math.inf)


def search(inner: str, every: int, start: dict[str, int], quick: bool) -> dict[str, Any]:
    """The setting with the least validation loss: each number in turn, in large and small moves."""
    trainer = Trainer(inner, every, quick=quick)
    tuned = list(LADDERS) if every else ["rate"]
    tried: dict[tuple[int, ...], float] = {}

    def setting(place: dict[str, int]) -> Setting:
        at = {name: LADDERS[name][i] for name, i in place.items()}
        return Setting(**at | {"rate": trainer.middle * at["rate"]})

    def loss(place: dict[str, int]) -> float:
        key = tuple(place.values())
        if any(not 0 <= i < len(LADDERS[name]) for name, i in place.items()):
            return math.inf
        if key not in tried and len(tried) < (3 if quick else TRIALS.get(every, OTHERS)):
            tried[key] = trainer.run(setting(place), SEEDS[0])[0]
        return tried.get(key, math.inf)

    best = start
    for stride in (2, 1):
        moved = True
        while moved:
            moved = False
            for name in tuned:
                for by in (stride, -stride):
                    while loss(next_ := best | {name: best[name] + by}) < loss(best):
                        best, moved = next_, True
    return {
        "setting": setting(best)._asdict(),
        "place": best,
        "validation": loss(best),
        "trials": len(tried),
        "at_an_end": [name for name in tuned if best[name] in (0, len(LADDERS[name]) - 1)],
    }


def final(inner: str, every: int, sent: str, setting: Setting, quick: bool) -> dict[str, Any]:
    """The test losses of all seeds."""
    trainer = Trainer(inner, every, sent, quick)
    losses = [trainer.run(setting, seed)[1] for seed in SEEDS[: 1 if quick else None]]
    bytes_ = BYTES[sent] * trainer.parameters / (every or 1)
    return {"test": losses, "bytes_per_step": bytes_, "parameters": trainer.parameters}


def study(inners: list[str], sent: list[str], processes: int, path: Path, quick: bool) -> None:
    """Runs what is missing in the result file."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    name = lambda *parts: " | ".join(map(str, parts))

    def keep(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        about = describe_machine("benchmarks.diloco", ("jax", "optax", "flax"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": dict(sorted(rows.items()))}, indent=1) + "\n")
        print(key, row, flush=True)

    def run(pool: ProcessPoolExecutor, jobs: dict[str, tuple[Any, ...]]) -> None:
        pending = {pool.submit(*job, quick): key for key, job in jobs.items() if key not in rows}
        for future in as_completed(pending):
            keep(pending[future], future.result())

    os.environ.update(ENVIRONMENT)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        searches = lambda inner, every, start: {
            name("search", inner, every): (search, inner, every, start)
        }
        first = [searches(inner, every, MIDDLE) for inner in inners for every in (FIRST, 0)]
        run(pool, functools.reduce(dict.__or__, first))
        found = lambda inner, every: rows[name("search", inner, every)]
        others = [
            searches(inner, every, found(inner, FIRST)["place"])
            for inner in inners
            for every in PERIODS
        ]
        run(pool, functools.reduce(dict.__or__, others))
        run(
            pool,
            {
                name("final", inner, every, dtype): (
                    final, inner, every, dtype, Setting(**found(inner, every)["setting"]),
                )
                for inner in inners
                for every in PERIODS
                for dtype in (sent if every else ["float32"])
            },
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="DiLoCo against synchronous training.")
    parser.add_argument("--inner", nargs="*", choices=list(INNER), default=list(INNER))
    parser.add_argument("--sent", nargs="*", choices=list(SENT), default=list(SENT))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps; writes to runs/")
    arguments = parser.parse_args()
    path = Path("runs/diloco.json") if arguments.quick else RESULTS
    study(arguments.inner, arguments.sent, arguments.processes, path, arguments.quick)


if __name__ == "__main__":
    main()
