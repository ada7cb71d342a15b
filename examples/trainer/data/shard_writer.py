"""Writes data of any size as shards, which ``examples.trainer.data.shards`` reads."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from examples.trainer.data.shards import DTYPES, Meta, Pair, check_targets
from examples.trainer.errors import UserError, expand


def write_shards(
    folder: str | Path, chunks: Iterable[Pair], rows_per_shard: int, classes: int
) -> None:
    """Writes ``(x, y)`` chunks of any length as shards, with one shard and one chunk in memory.

    meta.json is written last, so an interrupted write never looks like a data set. Values are not
    checked here; bad records are found when they are read.

    Args:
      folder: a new or empty folder.
      chunks: pairs of ``x`` ``[rows, ...]``, float32, float16 or uint8, and ``y`` ``[rows]``,
        integer labels or float targets.
      rows_per_shard: rows in each file, at least 1; the last file may have fewer.
      classes: number of classes; 0 for regression.

    Raises:
      UserError: if the folder cannot be written, or the chunks do not match each other.
    """
    folder = expand(folder)
    if rows_per_shard < 1 or classes < 0:
        raise UserError(
            f"need rows_per_shard >= 1 and classes >= 0, got {rows_per_shard} and {classes}"
        )
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; choose a new folder")
    meta = Meta(0, classes, (), "")
    for number, (x, y) in enumerate(_regroup(chunks, rows_per_shard, classes)):
        with _writing(folder):
            np.save(folder / f"x-{number:05d}.npy", x, allow_pickle=False)
            np.save(folder / f"y-{number:05d}.npy", y, allow_pickle=False)
        meta = Meta(meta.rows + len(x), classes, x.shape[1:], x.dtype.name)
    if not meta.rows:
        raise UserError(f"{folder}: there are no rows to write")
    with _writing(folder):
        part = folder / "meta.json.part"
        part.write_text(json.dumps(meta._asdict()))
        part.rename(folder / "meta.json")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None


def _regroup(chunks: Iterable[Pair], rows: int, classes: int) -> Iterator[Pair]:
    """Yields shards of ``rows`` rows (the last may be shorter), all in the same two buffers."""
    shard, filled = None, 0
    for chunk in chunks:
        x, y = map(np.asarray, chunk)
        if shard is None:
            _check_kind(x, y, classes)
            shard = np.empty((rows, *x.shape[1:]), x.dtype), np.empty(rows, y.dtype)
        _check_chunk(x, y, shard)
        while len(x):
            take = min(len(x), rows - filled)
            shard[0][filled : filled + take] = x[:take]
            shard[1][filled : filled + take] = y[:take]
            x, y, filled = x[take:], y[take:], filled + take
            if filled == rows:
                yield shard
                filled = 0
    if shard is not None and filled:
        yield shard[0][:filled], shard[1][:filled]


def _check_kind(x: np.ndarray, y: np.ndarray, classes: int) -> None:
    if x.ndim < 1 or x.dtype.name not in DTYPES or 0 in x.shape[1:]:
        raise UserError(
            f"need x of shape [rows, ...] and dtype {', '.join(DTYPES)}, got {x.shape} {x.dtype}"
        )
    check_targets("y", y.shape, y.dtype, classes)


def _check_chunk(x: np.ndarray, y: np.ndarray, shard: Pair) -> None:
    for name, array, buffer in zip("xy", (x, y), shard, strict=True):
        if array.shape[1:] != buffer.shape[1:] or array.dtype != buffer.dtype:
            raise UserError(
                f"every chunk needs {name} of [rows, *{buffer.shape[1:]}] {buffer.dtype}, "
                f"as the first, got {array.shape} {array.dtype}"
            )
    if len(x) != len(y):
        raise UserError(f"a chunk has {len(x)} rows of x and {len(y)} of y")
