"""Batches from shards on disk, read with grain: shuffled, prefetched, checked and resumable."""

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from absl import logging

from examples.trainer.cluster import processes
from examples.trainer.data.shards import ShardedSource
from examples.trainer.errors import UserError


@contextmanager
def _without(message: str) -> Iterator[None]:
    """Drops log records that contain ``message``."""
    logger, other = logging.get_absl_logger(), lambda record: message not in record.getMessage()
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


with _without("multiprocess worker profiling"):  # logged on import, with jaxlib < 0.11
    import grain

_IDENTITY = ("seed", "batch_size", "rows", "shards")


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An endless stream of batches of equal shape; each epoch contains every row once.

    A batch is ``batch_size`` consecutive rows of the data set, from one or more shards:
    ``x`` ``[batch, ...]`` as on disk, ``y`` ``[batch]`` int32 labels or float32 targets, and
    ``weight`` ``[batch]`` float32, 0 for a bad record (its row is set to zero) and 1 for a good
    one. Each epoch shuffles the batches, not the rows: rows that are sorted must be shuffled before
    they are written. The last ``rows % batch_size`` rows are never used.

    Several processes can read the same batches together, each a share of consecutive rows. All of
    them must then make the same calls.

    Args:
      source: from ``open_shards``; its ``on_bad`` decides what happens to bad records.
      batch_size: rows in a batch.
      seed: determines the order of the batches, 0 to 2**32 - 1.
      num_threads: threads that read ahead in the background, at least 1.
      prefetch: batches to read ahead; 0 reads in the calling thread.
      share: (number, count): this process reads part ``number`` of ``count`` equal parts.
    """

    def __init__(
        self,
        source: ShardedSource,
        batch_size: int,
        seed: int = 0,
        num_threads: int = 1,
        prefetch: int = 4,
        share: tuple[int, int] = (0, 1),
    ):
        _check_options(source, batch_size, seed, num_threads, prefetch)
        if batch_size % share[1]:
            raise UserError(f"batch_size={batch_size} cannot be split over {share[1]} processes")
        self.steps_per_epoch = source.rows // batch_size
        names = [(shard.x.path.name, shard.stop) for shard in source.shards]
        shards = zlib.crc32(repr(names).encode())
        self._identity = dict(zip(_IDENTITY, (seed, batch_size, source.rows, shards), strict=True))
        self._batches = 0  # handed out so far, over all epochs
        whole = source.meta.rows - source.rows if share[0] == 0 else 0
        self._first = share[0] == 0
        self._bad = Counter(nan=0, label=0, shard=whole)  # of this process
        # .seed(seed).shuffle() instead of .shuffle(seed), which adds the epoch to the seed: the
        # second epoch of seed 0 would be the first of seed 1.
        blocks = (
            grain.MapDataset.source(_Blocks(source, batch_size, share))
            .seed(seed)
            .shuffle()
            .repeat()
        )
        options = grain.ReadOptions(min(num_threads, prefetch), prefetch)
        self._reader: Any = iter(blocks.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        before = self._reader.get_state()
        batch, found, problem = next(self._reader)
        if problem:  # a checkpoint that is saved now must not skip this batch
            self._reader.set_state(before)
            raise UserError(problem)
        if self._batches < self.steps_per_epoch:  # later epochs read the same records again
            self._bad.update(found)
        self._batches += 1
        return batch

    @property
    def bad_records(self) -> dict[str, int]:
        """Bad rows so far, each counted once: "nan", "label" and "shard" (in damaged shards)."""
        return processes.sum_over_all(dict(self._bad))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, as plain JSON values."""
        state = {"batches": self._batches, "bad": self.bad_records}
        return {**self._identity, **state, "reader": dict(self._reader.get_state())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Returns to where ``get_state`` was called; UserError if the data or options differ."""
        for field, ours in self._identity.items():
            if state.get(field) != ours:
                raise UserError(
                    f"the checkpoint's data position is for {field} {state.get(field)}, this run "
                    f"has {ours}; use the same data and options, or a new workdir"
                )
        self._reader.set_state(state["reader"])
        self._batches = state["batches"]
        self._bad = Counter(state["bad"] if self._first else dict.fromkeys(state["bad"], 0))

    def close(self) -> None:
        """Ends the background threads."""
        self._reader.close()


def _check_options(
    source: ShardedSource, batch_size: int, seed: int, num_threads: int, prefetch: int
) -> None:
    if not 1 <= batch_size <= source.rows:
        raise UserError(f"batch_size must be 1 to {source.rows} (rows on disk), got {batch_size}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be 0 to 2**32 - 1, got {seed}")
    if num_threads < 1 or prefetch < 0:
        raise UserError(
            f"need num_threads >= 1 and prefetch >= 0, got {num_threads} and {prefetch}"
        )


class _Blocks:
    """The data set as a sequence of batches, or shares of batches, for grain."""

    def __init__(self, source: ShardedSource, batch_size: int, share: tuple[int, int]):
        self._source, self._size = source, batch_size
        self._part = batch_size // share[1]
        self._offset = share[0] * self._part

    def __len__(self) -> int:
        return self._source.rows // self._size

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, int], str]:
        """A batch, its bad records by kind, and the reason to refuse it.

        The reason is returned, not raised: grain's position is off by one after an exception.
        """
        start = index * self._size + self._offset
        try:
            x, y = self._source.read(start, start + self._part)
        except UserError as error:
            return {}, {}, str(error)
        nan, label = find_bad(x, y, self._source.meta.classes)
        bad = nan | label
        problem = ""
        if bad.any():
            if self._source.on_bad == "refuse":
                problem = describe_first_bad(self._source, start, y, nan, label)
            x[bad], y[bad] = 0, 0
        y = y.astype(np.int32) if self._source.meta.classes else y
        batch = {"x": x, "y": y, "weight": (~bad).astype(np.float32)}
        return batch, {"nan": int(nan.sum()), "label": int(label.sum())}, problem


def describe_first_bad(
    source: ShardedSource, start: int, y: np.ndarray, nan: np.ndarray, label: np.ndarray
) -> str:
    """Where the first bad row from ``start`` on is, and what is wrong with it."""
    position = int((nan | label).argmax())
    shard, row = source.locate(start + position)
    if nan[position]:
        return f"{shard.x.path}: row {row}, or its target in {shard.y.path.name}, is not finite"
    last = source.meta.classes - 1
    return f"{shard.y.path}: row {row} has label {y[position]}, need 0 to {last}"


def find_bad(x: np.ndarray, y: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks: rows that are not finite, and other rows with a label out of range."""
    finite = np.isfinite(y)
    if x.dtype.kind == "f":
        finite &= np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    wrong = (y < 0) | (y >= classes) if classes else np.zeros(len(y), bool)
    return ~finite, wrong & finite
