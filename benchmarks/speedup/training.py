"""Runs of one task with one optimizer, several of them at once in one compiled program."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speedup import optimizers
from examples.trainer.compiling import jit

Batch = dict[str, jax.Array]


class Task(NamedTuple):
    """What is learned, at the size at which it is run here."""

    title: str
    about: str
    setting: optimizers.Setting
    start: Callable[[int], tuple[Any, Any]]  # seed -> params, and what else a model keeps
    # (params, rest, batch) -> mean loss, (rest, score), of which the loss is minimized
    losses: Callable[[Any, Any, Batch], tuple[jax.Array, tuple[Any, jax.Array]]]
    train: Batch
    valid: Batch
    test: Batch
    seen: int  # the first training samples, on which the training loss is evaluated
    batch_size: int  # 0: everything at once
    score: str  # name of what losses returns in addition to the loss
    higher_is_better: bool
    trivial: float  # loss of the best constant prediction
    ratio: float = 1.08  # of the step of an evaluation to that of the one before
    scanned: bool = True  # all steps and runs in one program; on CPU slow for convolutions
    fusions: tuple[str, ...] = ("REDUCE",)
    scale: float = 1.0  # of the first learning rates of what is not adaptive
    low: float | None = None  # the minimum of the loss, where it is known
    momenta: tuple[float, ...] = ()  # each tuned by itself, those of heavy ball and NAG
    contestants: dict[str, optimizers.Optimizer] = optimizers.OPTIMIZERS


class Run(NamedTuple):
    seed: int
    rate: float
    second: float


class Result(NamedTuple):
    """Of one run, at the iterate that the optimizer evaluates; NaN from a divergence on."""

    losses: np.ndarray  # training loss at each of evaluations(steps)
    scores: np.ndarray  # on the validation set, at the same steps
    loss: float  # at the end
    score: float
    test: float  # score on the whole test set at the end, NaN unless asked for


def evaluations(steps: int, ratio: float = 1.08) -> np.ndarray:
    """The steps after which a run is evaluated: all at first, then ``ratio`` apart, the last."""
    found, step = [0], 1
    while step < steps:
        found.append(step)
        step = max(step + 1, round(step * ratio))
    return np.array([*found, steps])


GAP = 1e-4  # of the loss to its minimum, in units of that at the start


def steps_to_gap(points: Any, losses: Any, low: float) -> int | None:
    """Steps until the loss is within GAP of its minimum."""
    curve = np.array([np.nan if v is None else v for v in losses], float)
    hits = np.flatnonzero(curve - low <= GAP * (curve[0] - low))
    return int(points[hits[0]]) if len(hits) else None


def orders(task: Task, seed: int) -> np.ndarray:
    """Indices of the samples of each batch, ``[steps, batch]``; each epoch in a new order."""
    samples, rng = len(task.train["x"]), np.random.default_rng(seed)
    size = task.batch_size or samples
    if not task.batch_size:
        return np.tile(np.arange(samples, dtype=np.int32), (1, 1))
    per_epoch = samples // size
    epochs = -(-task.setting.steps // per_epoch)
    rows = [rng.permutation(samples)[: per_epoch * size] for _ in range(epochs)]
    return np.concatenate(rows).reshape(-1, size)[: task.setting.steps].astype(np.int32)


class Trainer:
    """Compiles a task with an optimizer once; seeds and hyperparameters are arguments."""

    def __init__(self, task: Task, optimizer: optimizers.Optimizer):
        self.task, self.optimizer = task, optimizer
        self.points = evaluations(task.setting.steps, task.ratio)
        self.flags = np.isin(np.arange(task.setting.steps), self.points - 1)
        compiled = lambda function, **more: jit(function, task.fusions, **more)
        self.starts = compiled(jax.vmap(self._start))
        # One after the other: on few cores as fast as jax.vmap, and each with its own branches.
        self.many = compiled(
            lambda flags, *runs: jax.lax.map(functools.partial(self._whole, flags), runs)
        )
        self.one = compiled(self._step, donate_argnums=0)
        self.measure = compiled(self._evaluate)
        self.measure_many = compiled(jax.vmap(self._evaluate, in_axes=(0, None)))

    def _transformation(self, hyper: Any) -> optax.GradientTransformationExtraArgs:
        return optimizers.transformation(self.optimizer, self.task.setting, hyper)

    def _start(self, params: Any, rest: Any, hyper: Any) -> Any:
        return params, rest, self._transformation(hyper).init(params)

    def _batch(self, order: jax.Array) -> Batch:
        if not self.task.batch_size:
            return self.task.train
        return jax.tree.map(lambda x: x[order], self.task.train)

    def _step(self, carry: Any, hyper: Any, order: jax.Array) -> Any:
        params, rest, state = carry
        batch = self._batch(order)

        def loss(params: Any) -> Any:
            return self.task.losses(params, rest, batch)

        (value, (rest, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = self._transformation(hyper).update(
            grads, state, params, value=value, grad=grads, value_fn=lambda p: loss(p)[0]
        )
        return optax.apply_updates(params, updates), rest, state

    def _evaluate(self, carry: Any, batch: Batch) -> jax.Array:
        params, rest, state = carry
        x = self.optimizer.evaluate(params, state)
        loss, (_, score) = self.task.losses(x, rest, batch)
        return jnp.stack([loss, score])

    def _both(self, carry: Any) -> jax.Array:
        """Training loss, and score on the validation set."""
        seen = jax.tree.map(lambda x: x[: self.task.seen], self.task.train)
        loss, score = self._evaluate(carry, seen)[0], self._evaluate(carry, self.task.valid)[1]
        return jnp.stack([loss, score])

    def _whole(self, flags: jax.Array, run: Any) -> Any:
        """All steps of a run, and what its evaluations gave, ``[1 + steps, 2]``."""
        carry, hyper, order = run
        nothing = lambda carry: jnp.full(2, jnp.nan)

        def body(carry: Any, item: Any) -> Any:
            index, flag = item
            carry = self._step(carry, hyper, order[index])
            return carry, jax.lax.cond(flag, self._both, nothing, carry)

        first = self._both(carry)
        steps = jnp.arange(self.task.setting.steps) % len(order)
        carry, found = jax.lax.scan(body, carry, (steps, flags))
        return carry, jnp.concatenate([first[None], found])

    def hyper(self, runs: list[Run]) -> Any:
        values = np.array([[run.rate, run.second] for run in runs], np.float32)
        hyper = {"rate": jnp.asarray(values[:, 0])}
        if self.optimizer.second:
            hyper[self.optimizer.second] = jnp.asarray(values[:, 1])
        return hyper

    def run(self, runs: list[Run], *, test: bool = False) -> list[Result]:
        hyper = self.hyper(runs)
        starts = [self.task.start(run.seed) for run in runs]
        params, rest = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        carry = self.starts(params, rest, hyper)
        order = np.stack([orders(self.task, run.seed) for run in runs])
        if self.task.scanned:
            carry, found = self.many(self.flags, carry, hyper, order)
            curves = np.asarray(found)[:, self.points]
            tests = np.asarray(self.measure_many(carry, self.task.test)) if test else None
        else:
            whole = carry, hyper, order
            pairs = [
                self._alone(jax.tree.map(lambda x: x[i], whole), test)  # noqa: B023
                for i in range(len(runs))
            ]
            curves, tests = (np.stack(items) for items in zip(*pairs, strict=True))
        return [
            Result(
                curve[:, 0], curve[:, 1], float(curve[-1, 0]), float(curve[-1, 1]),
                float("nan") if tests is None else float(tests[i][1]),
            )
            for i, curve in enumerate(curves)
        ]  # fmt: skip

    def _alone(self, run: Any, test: bool) -> tuple[Any, Any]:
        """The same step by step, up to where it is not finite; with the test set at the end."""
        carry, hyper, order = run
        seen = jax.tree.map(lambda x: x[: self.task.seen], self.task.train)
        both = lambda c: (self.measure(c, seen)[0], self.measure(c, self.task.valid)[1])
        curve = np.full((len(self.points), 2), np.nan)
        curve[0] = both(carry)
        for step, index in enumerate(order):
            carry = self.one(carry, hyper, index)
            if self.flags[step]:
                found = curve[np.searchsorted(self.points, step + 1)] = both(carry)
                if not np.all(np.isfinite(found)):
                    break
        nothing = np.full(2, np.nan)
        return curve, np.asarray(self.measure(carry, self.task.test)) if test else nothing

    def milliseconds(self, run: Run, rounds: int = 10, seconds: float = 0.5) -> float:
        """A step of one run alone in the fastest round: what else runs here can only add."""
        hyper = jax.tree.map(lambda x: x[0], self.hyper([run]))
        carry = self._start(*self.task.start(run.seed), hyper)
        order = jnp.asarray(orders(self.task, run.seed))

        def several(carry: Any, hyper: Any, indices: jax.Array) -> Any:
            body = lambda carry, index: (self._step(carry, hyper, index), None)
            return jax.lax.scan(body, carry, indices)[0]

        block = jit(several, self.task.fusions, donate_argnums=0)

        def advance(carry: Any, count: int) -> Any:
            for _ in range(count):
                if self.task.scanned:
                    carry = block(carry, hyper, jnp.tile(order, (10, 1))[:10])
                else:
                    for index in order[:10]:
                        carry = self.one(carry, hyper, index)
            return jax.block_until_ready(carry)

        carry = advance(jax.tree.map(jnp.array, carry), 1)
        begin = time.perf_counter()
        carry = advance(carry, 1)
        count = max(1, round(seconds / rounds / (time.perf_counter() - begin)))
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            carry = advance(carry, count)
            times.append((time.perf_counter() - begin) / count / 10)
        return 1e3 * min(times)
