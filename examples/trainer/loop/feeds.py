"""Where batches come from: arrays on the device, or shards on disk."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from examples.trainer.cluster import processes
from examples.trainer.cluster.layout import Layout
from examples.trainer.compiling import jit
from examples.trainer.data.datasets import Dataset
from examples.trainer.data.shards import ShardedSource, open_shards
from examples.trainer.data.streaming import (
    BatchStream,
    describe_first_bad,
    find_bad,
)
from examples.trainer.errors import UserError, expand
from examples.trainer.loop import steps
from examples.trainer.run.state import TrainState

_PROBE_BATCHES = 20  # enough for the statistics of pixels and of BatchNorm


class MemoryFeed:
    """Samples kept on the devices; the order in an epoch depends only on the key of the state."""

    def __init__(self, config: Any, dataset: Dataset, layout: Layout):
        self.samples = layout.put_whole(dataset.train)
        count = len(dataset.train["x"])
        if config.batch_size > count:
            raise UserError(
                f"config.batch_size={config.batch_size} is more than the {count} training samples "
                f"of {config.dataset}"
            )
        self.steps_per_epoch = count // config.batch_size
        # Updates in one compiled program; None: all up to the next stop, in one scan.
        self.stride = None if config.scan else 1
        self._count, self._batch_size = count, config.batch_size
        self._fusions = config.cpu_fusions
        self._epoch = -1
        self._order: Any = None

    def compile(self, update: Callable) -> None:
        shape = self._batch_size, self.steps_per_epoch
        self._run = steps.make_run(update, *shape, self._fusions)

    def advance(self, state: TrainState, step: int, n: int) -> TrainState:
        """The state after n updates, all of them in the epoch of ``step``."""
        if step // self.steps_per_epoch != self._epoch:
            self._epoch = step // self.steps_per_epoch
            self._order = steps.epoch_order(state.key, self._epoch, self._count)
        return self._run(state, self.samples, self._order, n)

    def get_state(self) -> None:
        """Nothing: the position follows from the state's step."""

    def set_state(self, state: None) -> None:
        """Nothing to set."""

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to close."""


class StreamFeed:
    """Batches from the shards in ``data_dir/train``, read ahead in the background.

    If several processes train together, each reads its share of every batch.
    """

    stride = 1

    def __init__(
        self, config: Any, source: ShardedSource, probe: dict[str, np.ndarray], layout: Layout
    ):
        for problem in source.skipped:
            processes.say(f"skipped: {problem}")
        self.samples, self._layout = layout.put_whole(probe), layout
        share = jax.process_index(), jax.process_count()
        self._fusions = config.cpu_fusions
        self._stream = BatchStream(source, config.batch_size, config.seed, share=share)
        self.steps_per_epoch = self._stream.steps_per_epoch

    def compile(self, update: Callable) -> None:
        self._update = jit(update, self._fusions, donate_argnums=0)

    def advance(self, state: TrainState, step: int, n: int) -> TrainState:
        for _ in range(n):
            state = self._update(state, self._layout.put_rows(next(self._stream)))
        return state

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)

    def counters(self) -> dict[str, float]:
        return {"bad_records": float(sum(self._stream.bad_records.values()))}

    def close(self) -> None:
        self._stream.close()


Feed = MemoryFeed | StreamFeed


def open_stream(config: Any) -> tuple[Dataset, ShardedSource]:
    """Opens the shards in ``data_dir/train`` and reads those in ``data_dir/test`` into memory."""
    if not config.data_dir:
        raise UserError(
            "config.dataset=shards needs --config.data_dir=FOLDER, with FOLDER/train and "
            "FOLDER/test written by examples.trainer.data.shard_writer.write_shards"
        )
    folder = expand(config.data_dir)
    source = open_shards(folder / "train", config.on_bad)
    test = open_shards(folder / "test", config.on_bad)
    if source.meta._replace(rows=0) != test.meta._replace(rows=0):
        raise UserError(f"{folder}: train and test differ in meta.json: {source.meta}, {test.meta}")
    if config.batch_size > source.rows:
        raise UserError(
            f"config.batch_size={config.batch_size} is more than the {source.rows} rows in {folder}"
        )
    probe, _ = _arrays(source, min(_PROBE_BATCHES * config.batch_size, source.rows))
    held_out, bad = _arrays(test, test.rows)
    for problem in (*test.skipped, *([f"{folder / 'test'}: {bad} bad records"] if bad else [])):
        processes.say(f"skipped: {problem}")
    names = tuple(str(label) for label in range(source.meta.classes))
    pixels = probe["x"].astype(np.float64)
    mean, std = float(pixels.mean()), max(float(pixels.std()), 1e-6)
    return Dataset(probe, held_out, names, mean, std), source


def _arrays(source: ShardedSource, rows: int) -> tuple[dict[str, np.ndarray], int]:
    """The first rows without their bad records, and the number of bad records."""
    x, y = source.read(0, rows)
    nan, label = find_bad(x, y, source.meta.classes)
    good = ~(nan | label)
    if source.on_bad == "refuse" and not good.all():
        raise UserError(describe_first_bad(source, 0, y, nan, label))
    if not good.any():
        folder = source.shards[0].x.path.parent
        raise UserError(f"{folder}: all of the first {rows} rows are bad")
    target = np.int32 if source.meta.classes else np.float32
    return {"x": x[good], "y": y[good].astype(target)}, int(rows - good.sum())
