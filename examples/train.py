"""Trains a Flax model with NAG: ``python -m examples.train --config=CONFIG --workdir=FOLDER``."""

import ast
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags
from rich.progress import track

import nag_jax
from examples import data, models, plots
from examples.errors import UserError


class TrainState(NamedTuple):
    """Everything that changes during training."""

    params: Any  # where gradients are taken
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over samples, so that they add up over batches."""

    loss: jax.Array
    correct: jax.Array
    samples: jax.Array


def make_optimizer(config: Any, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer that the config describes, its schedule counted in steps."""
    total_steps = config.num_epochs * steps_per_epoch
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup_steps, max(total_steps, warmup_steps + 1)
        )
    elif config.schedule == "constant":
        rate = optax.warmup_constant_schedule(0.0, config.learning_rate, warmup_steps)
    else:
        raise UserError(f"config.schedule must be one of constant, cosine, got {config.schedule!r}")
    if config.optimizer.name != "nag":
        raise UserError(f"config.optimizer.name must be nag, got {config.optimizer.name!r}")
    try:
        nag_jax.nag(config.learning_rate, config.momentum)  # a schedule hides a bad peak
        return nag_jax.nag(
            rate,
            config.momentum,
            convention=config.optimizer.convention,
            weight_decay=config.weight_decay,
            weight_decay_mask=functools.partial(jax.tree.map, lambda p: p.ndim > 1),
            decay=config.decay,
        )
    except ValueError as error:
        raise UserError(f"config: {error}") from None


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> list[dict[str, float]]:
    """Trains as ``config`` says and returns the metrics of every epoch.

    Writes ``config.json``, ``metrics.jsonl`` and ``curves.png`` into ``workdir``. A run that is
    finished there is not repeated.
    """
    check(config)
    dataset = data.load(config.dataset, config.data_dir)
    steps_per_epoch = len(dataset.train.labels) // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size={config.batch_size} is more than the "
            f"{len(dataset.train.labels)} training samples of {config.dataset}"
        )
    optimizer = make_optimizer(config, steps_per_epoch)
    workdir = Path(workdir)
    finished = claim(workdir, config)
    if finished:
        print(f"{workdir}: finished before; {describe(finished[-1])}")
        return finished

    init_key, shuffle_key = jax.random.split(jax.random.key(config.seed))
    graph, params, rest = make_model(config, dataset, init_key)
    apply = lambda params, images: nnx.merge(graph, params, rest, copy=True)(
        (images.astype(jnp.float32) - dataset.mean) / dataset.std
    )
    train_epoch, test = make_epoch(apply, optimizer, config.batch_size), make_test(apply)
    state = TrainState(params, optimizer.init(params))
    train_data, test_data = jax.device_put((dataset.train, dataset.test))

    history = []
    epochs = range(1, config.num_epochs + 1)
    with (workdir / "metrics.jsonl").open("w") as log:
        for epoch in track(epochs, "training", disable=not sys.stderr.isatty(), transient=True):
            start = time.perf_counter()
            key = jax.random.fold_in(shuffle_key, epoch)
            state, train_metrics = train_epoch(state, train_data, key)
            evaluated = nag_jax.eval_params(state.params, state.opt_state)
            test_metrics = test(evaluated, test_data, config.eval_batch_size)
            row = {"epoch": epoch, "step": epoch * steps_per_epoch}
            row |= summarize("train", train_metrics) | summarize("test", test_metrics)
            if not math.isfinite(row["train_loss"]):
                raise UserError(
                    f"the loss is {row['train_loss']} in epoch {epoch}; try a smaller "
                    f"--config.learning_rate than {config.learning_rate:g}"
                )
            history.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(f"{describe(row)}, {time.perf_counter() - start:.2f} s", flush=True)
    plots.save_curves(workdir / "curves.png", history)
    return history


def check(config: Any) -> None:
    """Refuses values that no run can use, before anything is read or written."""
    for name in ("batch_size", "eval_batch_size", "num_epochs"):
        if config[name] < 1:
            raise UserError(f"config.{name} must be at least 1, got {config[name]}")
    if not config.warmup_epochs >= 0:
        raise UserError(f"config.warmup_epochs must be at least 0, got {config.warmup_epochs}")


def claim(workdir: Path, config: Any) -> list[dict[str, float]]:
    """Makes ``workdir`` this run's own; returns its metrics if it is finished already."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = config.to_json(indent=2, sort_keys=True)
        path = workdir / "config.json"
        if path.exists() and path.read_text() != text:
            raise UserError(
                f"{workdir} holds a run of another config (see {path.name} there); choose "
                "another --workdir or remove it"
            )
        path.write_text(text)
        log = workdir / "metrics.jsonl"
        rows = [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else []
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used: {error.strerror}") from None
    except json.JSONDecodeError:
        return []  # killed while it wrote
    return rows if len(rows) == config.num_epochs else []


def make_model(config: Any, dataset: data.Dataset, key: jax.Array) -> tuple[nnx.GraphDef, Any, Any]:
    """The model, split into its definition, its parameters and the rest of its state."""
    if config.model.name != "mlp":
        raise UserError(f"config.model.name must be mlp, got {config.model.name!r}")
    inputs = math.prod(dataset.train.images.shape[1:])
    model = models.MLP(
        inputs, config.model.hidden_sizes, len(dataset.class_names), rngs=nnx.Rngs(key)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest


def make_epoch(
    apply: Callable, optimizer: optax.GradientTransformationExtraArgs, batch_size: int
) -> Callable:
    """One epoch as one program: ``(state, train split, key) -> (state, Metrics)``, donating."""

    def loss_fn(params: Any, batch: data.Split) -> tuple[jax.Array, Metrics]:
        logits = apply(params, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), count(logits, losses, batch.labels, jnp.ones_like(losses))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_epoch(
        state: TrainState, train: data.Split, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        steps = len(train.labels) // batch_size
        order = jax.random.permutation(key, len(train.labels))
        order = order[: steps * batch_size].reshape(steps, batch_size)

        def step(state: TrainState, indices: jax.Array) -> tuple[TrainState, Metrics]:
            batch = jax.tree.map(lambda x: x[indices], train)
            gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

        state, metrics = jax.lax.scan(step, state, order)
        return state, jax.tree.map(jnp.sum, metrics)

    return train_epoch


def make_test(apply: Callable) -> Callable:
    """``(params, test split, batch_size) -> Metrics`` over every sample, the last ones padded."""

    @jax.jit
    def test_batch(params: Any, batch: data.Split, mask: jax.Array) -> Metrics:
        logits = apply(params, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return count(logits, losses, batch.labels, mask)

    def test(params: Any, split: data.Split, batch_size: int) -> Metrics:
        size = len(split.labels)
        batch_size = min(batch_size, size)
        total = Metrics(*jnp.zeros(3))
        for start in range(0, size, batch_size):
            indices = jnp.arange(start, start + batch_size)
            batch = jax.tree.map(lambda x: x[jnp.minimum(indices, size - 1)], split)  # noqa: B023
            total = jax.tree.map(jnp.add, total, test_batch(params, batch, indices < size))
        return total

    return test


def count(logits: jax.Array, losses: jax.Array, labels: Any, mask: jax.Array) -> Metrics:
    """The sums over the samples of a batch where ``mask`` is true."""
    correct = (logits.argmax(-1) == labels) * mask
    return Metrics(jnp.sum(losses * mask), correct.sum(), mask.sum())


def summarize(split: str, metrics: Metrics) -> dict[str, float]:
    """Mean loss, and accuracy in percent."""
    loss, correct, samples = (float(x) for x in jax.device_get(metrics))
    return {f"{split}_loss": loss / samples, f"{split}_accuracy": 100 * correct / samples}


def describe(row: dict[str, float]) -> str:
    """One line for people and for grep."""
    losses = "".join(
        f", {split}_loss: {row[f'{split}_loss']:.4f}, "
        f"{split}_accuracy: {row[f'{split}_accuracy']:.2f}"
        for split in ("train", "test")
    )
    return f"epoch: {row['epoch']:3d}{losses}"


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser, with one line instead of a traceback."""
    logging.set_verbosity(logging.WARNING)
    try:
        rest = flags.FLAGS(arguments)
        flags.FLAGS.config.keys()  # raises what went wrong when the file was loaded
        return rest
    except Exception as error:  # ml_collections raises many kinds for a wrong field or value
        message = str(error)
        if message.startswith("'"):  # ml_collections repeats the text of a KeyError
            message = ast.literal_eval(message).replace("\n", " is no field: ")
        sys.exit(f"error: {' '.join(message.split())}")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {' '.join(arguments[1:])}; options begin with --")
    try:
        train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command starts this run again")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with the run's config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the run's metrics and curves.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
