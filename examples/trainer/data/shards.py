"""Data sets larger than memory: folders of .npy shards, read by memory mapping.

x-00000.npy, x-00001.npy, ...   [rows, ...] float32, float16 or uint8
y-00000.npy, y-00001.npy, ...   [rows] integer labels, or float targets
meta.json                       rows, classes (0: regression), shape and dtype of a row of x
"""

import json
import math
import os
import re
import warnings
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.trainer.errors import UserError, expand

DTYPES = ("float32", "float16", "uint8")
Pair = tuple[np.ndarray, np.ndarray]


class Array(NamedTuple):
    """The header of one .npy file, checked against the size of the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of the first row, in bytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Maps only these rows; a map that stays open would count as memory of this process."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        offset = self.offset + start * row_bytes
        try:
            return np.memmap(self.path, self.dtype, "r", offset, (stop - start, *self.shape[1:]))
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than the map
            raise UserError(f"{self.path}: changed since it was opened: {error}") from None


class Shard(NamedTuple):
    """One pair of files: rows ``start`` to ``stop`` of the data set."""

    x: Array
    y: Array
    start: int
    stop: int


class Meta(NamedTuple):
    """The contents of meta.json."""

    rows: int
    classes: int  # 0: regression
    shape: tuple[int, ...]  # of one row of x
    dtype: str  # of x


class ShardedSource(NamedTuple):
    """The good shards of a folder as one sequence of rows; nothing is kept in memory."""

    meta: Meta
    shards: tuple[Shard, ...]
    skipped: tuple[str, ...]  # why the other shards are skipped, one line each
    on_bad: str  # "skip" or "refuse"

    @property
    def rows(self) -> int:
        """The number of rows that can be read."""
        return self.shards[-1].stop

    def read(self, start: int, stop: int) -> Pair:
        """Copies rows ``start`` to ``stop``, from one or more shards."""
        x = np.empty((stop - start, *self.meta.shape), self.meta.dtype)
        y = np.empty(stop - start, np.int64 if self.meta.classes else np.float32)
        row = start
        while row < stop:
            shard, first = self.locate(row)
            count = min(stop, shard.stop) - row
            into = slice(row - start, row - start + count)
            x[into] = shard.x.rows(first, first + count)
            with np.errstate(over="ignore"):  # float64 targets out of range become inf
                y[into] = shard.y.rows(first, first + count)
            row += count
        return x, y

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard that contains ``row``, and the number of the row in that shard."""
        shard = self.shards[bisect_right(self.shards, row, key=lambda shard: shard.stop)]
        return shard, row - shard.start


def open_shards(folder: str | Path, on_bad: str = "skip") -> ShardedSource:
    """Checks the headers and sizes of all shards against meta.json; reads no data.

    Args:
      folder: a folder that ``shard_writer.write_shards`` has written.
      on_bad: ``"skip"`` skips damaged shards and lists them in ``skipped``; ``"refuse"`` raises
        an error at the first. ``BatchStream`` treats bad records in the same way.

    Raises:
      UserError: if meta.json is missing or wrong, if no shard is good, or if a shard is refused.
    """
    if on_bad not in ("skip", "refuse"):
        raise UserError(f"on_bad must be 'skip' or 'refuse', got {on_bad!r}")
    folder = expand(folder)
    meta = _read_meta(folder / "meta.json")
    names, problems = _find_shards(folder)
    shards: list[Shard] = []
    for name in names:
        try:
            shards.append(_open_shard(folder, name, meta, shards[-1].stop if shards else 0))
        except UserError as error:
            problems.append(str(error))
    rows = shards[-1].stop if shards else 0
    count = f"{folder}: meta.json promises {meta.rows} rows, the shards hold {rows}"
    if rows > meta.rows:
        raise UserError(count)
    if rows < meta.rows and not problems:
        problems.append(count)
    if problems and (on_bad == "refuse" or not rows):
        raise UserError(problems[0])
    return ShardedSource(meta, tuple(shards), tuple(problems), on_bad)


def _read_meta(path: Path) -> Meta:
    need = f"{path}: need rows >= 1, classes >= 0, shape, dtype ({', '.join(DTYPES)})"
    try:
        found = json.loads(path.read_bytes())
        meta = Meta(found["rows"], found["classes"], tuple(found["shape"]), found["dtype"])
    except OSError as error:
        reason = f"{error.strerror or error}; not a data set, or its writing was interrupted"
        raise UserError(f"{path}: {reason}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{need}: {type(error).__name__}: {error}") from None
    sizes = (meta.rows, meta.classes, *meta.shape)
    whole = all(type(size) is int and size >= 0 for size in sizes)
    if not whole or 0 in (meta.rows, *meta.shape) or meta.dtype not in DTYPES:
        raise UserError(f"{need}, got {found}")
    return meta


def _find_shards(folder: Path) -> tuple[list[str], list[str]]:
    """The numbers of the shards, in order, and one line for each gap between them."""
    matches = (re.fullmatch(r"[xy]-([0-9]{5,9})\.npy", name) for name in os.listdir(folder))
    names = sorted({match[1] for match in matches if match}, key=int)
    pairs = pairwise([-1, *map(int, names)])
    gaps = [f"{folder / f'x-{a + 1:05d}.npy'}: no such file" for a, b in pairs if b > a + 1]
    return names, gaps


def _open_shard(folder: Path, name: str, meta: Meta, start: int) -> Shard:
    x, y = (_read_header(folder / f"{letter}-{name}.npy") for letter in "xy")
    if x.shape[1:] != meta.shape or x.dtype != np.dtype(meta.dtype):
        raise UserError(
            f"{x.path}: need rows of {meta.shape} {meta.dtype}, got {x.shape[1:]} {x.dtype}"
        )
    check_targets(y.path, y.shape, y.dtype, meta.classes)
    if y.shape != x.shape[:1]:
        raise UserError(f"{y.path}: has {y.shape[0]} rows, {x.path.name} has {x.shape[0]}")
    return Shard(x, y, start, start + x.shape[0])


def check_targets(name: object, shape: tuple[int, ...], dtype: np.dtype, classes: int) -> None:
    """UserError unless these are integer labels, or float targets for regression."""
    kinds, words = ("iu", "integer labels") if classes else ("f", "float targets")
    if len(shape) != 1 or dtype.kind not in kinds:
        raise UserError(f"{name}: need {words} of shape [rows], got {shape} {dtype}")


def _read_header(path: Path) -> Array:
    """Reads only the header, so that a wrong one costs no memory."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            # Only this version: in others, the file decides how much is read.
            if np.lib.format.read_magic(file) != (1, 0):
                raise UserError(f"{path}: need .npy format 1.0, which np.save writes")
            # numpy allows headers of 10,000 bytes, but parsing a damaged one of 9,000 takes 50 MB
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(file, 1024)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = math.prod(shape) * dtype.itemsize
        if size - offset != expected or dtype.hasobject:
            raise UserError(
                f"{path}: its header promises {expected} bytes of {shape} {dtype}, "
                f"it holds {size - offset}; write it again"
            )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # numpy uses Python's parser for the header, which raises many kinds
        raise UserError(f"{path}: not a .npy file, or its header is damaged") from None
    if by_column and len(shape) > 1:
        raise UserError(f"{path}: stored by columns, need rows (np.ascontiguousarray)")
    return Array(path, shape, dtype, offset)
