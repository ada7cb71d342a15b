"""Trains on a data set several times larger than the process, and samples the memory it takes.

    python -m benchmarks.streaming

Writes 10 million rows of 32 features in 10 classes to disk, trains softmax regression on them
with ``nag_jax.nag`` for one epoch, and writes results/streaming.json. The labels are those of a
linear teacher whose scores have noise, so no classifier gets them all right: the teacher's own
accuracy is in the file next to the one reached. A second, untimed epoch traces the Python heap,
which would slow the first down by a third. The files were written just before, so most of them
are read from the page cache: rows per second measure the program, not the disk.
"""

import argparse
import json
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks.machine import describe_machine
from examples.trainer.data.shard_writer import write_shards
from examples.trainer.data.shards import open_shards
from examples.trainer.data.streaming import BatchStream

FEATURES, CLASSES, BATCH, CHUNK, ROWS_PER_SHARD = 32, 10, 4096, 1 << 16, 1 << 19
RESULT = Path(__file__).parent / "results" / "streaming.json"


def main() -> None:
    """Writes the data, trains, and reports."""
    parser = argparse.ArgumentParser(description="Training from disk at constant memory.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", help="new or empty, kept; default: temporary, removed")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or Path(temporary) / "data")
        teacher, start = make_teacher(), time.perf_counter()
        write_shards(folder, make_rows(teacher, options.rows, seed=1), ROWS_PER_SHARD, CLASSES)
        written = time.perf_counter() - start
        size = sum(file.stat().st_size for file in folder.iterdir())
        params, figures = train(folder, resident_bytes)
        tracemalloc.start()
        traced = train(folder, lambda: tracemalloc.get_traced_memory()[0])[1]
        tracemalloc.stop()
    result = {
        **describe_machine("benchmarks.streaming", ("jax", "optax", "grain", "numpy")),
        "rows": options.rows,
        "bytes_on_disk": size,
        "seconds_to_write": round(written, 1),
        **figures,
        "python_heap_bytes": traced["memory_bytes"],
        **evaluate(params, teacher),
    }
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def make_teacher() -> np.ndarray:
    """The weights ``[features, classes]`` that the labels come from."""
    return np.random.default_rng(0).standard_normal((FEATURES, CLASSES), np.float32)


def make_rows(teacher: np.ndarray, rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of ``rows`` rows in all: x is normal, y the class of the best noisy score."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, CHUNK):
        x = rng.standard_normal((min(CHUNK, rows - start), FEATURES), np.float32)
        scores = x @ teacher
        scores += rng.standard_normal(scores.shape, np.float32)
        yield x, scores.argmax(1).astype(np.int32)


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the records that are not bad."""
    logits = batch["x"] @ params["w"] + params["b"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.average(losses, weights=batch["weight"])


def train(folder: Path, sample_memory: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """One epoch; returns the params and the figures of the result file."""
    stream = BatchStream(open_shards(folder), BATCH, seed=0)
    steps = stream.steps_per_epoch
    tx = nag_jax.nag(optax.cosine_decay_schedule(0.3, steps), 0.9)
    params = {"w": jnp.zeros((FEATURES, CLASSES)), "b": jnp.zeros(CLASSES)}
    state = tx.init(params)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    params, state, value = step(params, state, jax.device_put(next(stream)))  # compiles
    memory, start = {"after the first step": sample_memory()}, time.perf_counter()
    moments = {round(steps * percent / 100): f"{percent} %" for percent in (10, 25, 50, 75, 100)}
    for done in range(2, steps + 1):
        late = value
        params, state, value = step(params, state, jax.device_put(next(stream)))
        late.block_until_ready()  # one step late: the device never waits, nor does a queue grow
        if done in moments:
            memory[moments[done]] = sample_memory()
    seconds = time.perf_counter() - start
    stream.close()
    return params, {
        "batch_size": BATCH,
        "steps": steps,
        "rows_per_second": round((steps - 1) * BATCH / seconds),
        "memory_bytes": memory,
        "bad_records": stream.bad_records,
    }


def resident_bytes() -> dict[str, int]:
    """What this process holds now: RssAnon is what it allocated, VmRSS that and mapped files."""
    status = Path("/proc/self/status").read_text()
    return {
        name: 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0])
        for name in ("RssAnon", "VmRSS")
    }


def evaluate(params: dict[str, jax.Array], teacher: np.ndarray) -> dict[str, float]:
    """Accuracy on rows that were not trained on, of the model and of the teacher's weights."""
    ((x, y),) = make_rows(teacher, CHUNK, seed=2)
    right = (x @ np.asarray(params["w"]) + np.asarray(params["b"])).argmax(1) == y
    best = (x @ teacher).argmax(1) == y
    return {"test_accuracy": float(right.mean()), "teacher_accuracy": float(best.mean())}


if __name__ == "__main__":
    main()
