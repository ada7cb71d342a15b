"""Readers of standard file formats. They do not trust headers and never unpickle.

Each raises UserError for a missing, damaged or wrong file, with the file and what is wrong, and
uses no more memory than the size of the file can justify.
"""

import codecs
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from examples.trainer.errors import UserError

_CHUNK = 1 << 20
_GZIP_RATIO = 1040  # the most by which deflate can expand data
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)
# Byte-order marks; UTF-32 comes first, because its mark starts with that of UTF-16. Decoding with
# these names removes the mark.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8-sig",
}


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes (MNIST's format), plain or gzipped."""
    with _opened(path) as file:
        header = file.read(4)
        if len(header) < 4 or header[:2] != b"\0\0" or not 1 <= header[3] <= 4:
            raise UserError(f"{path}: not an IDX file (starts with {header.hex() or 'nothing'})")
        if header[2] != 8:
            raise UserError(f"{path}: IDX data type 0x{header[2]:02x}, need 0x08 (unsigned bytes)")
        sizes = file.read(4 * header[3])
        if len(sizes) < 4 * header[3]:
            raise UserError(f"{path}: ends within its header; download it again")
        shape = struct.unpack(f">{header[3]}I", sizes)
        expected = math.prod(shape)
        zipped = isinstance(file, gzip.GzipFile)
        if expected > path.stat().st_size * (_GZIP_RATIO if zipped else 1):
            raise UserError(
                f"{path}: its header promises {expected} bytes of data {shape}, more than the "
                "file can hold; it is truncated or not IDX"
            )
        found = b"".join(_chunks(file, expected + 1))
    if len(found) != expected:
        more = "more" if len(found) > expected else f"only {len(found)}"
        raise UserError(
            f"{path}: its header promises {expected} bytes of data {shape}, it holds {more}; "
            "download it again"
        )
    return np.frombuffer(found, np.uint8).reshape(shape)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one batch of CIFAR-10's binary version: images ``[n, 32, 32, 3]`` uint8, labels."""
    with _opened(path) as file:
        size = path.stat().st_size
        if isinstance(file, gzip.GzipFile):
            raise UserError(f"{path}: is gzipped; unpack cifar-10-binary.tar.gz first")
        if size == 0 or size % _CIFAR_RECORD:
            raise UserError(
                f"{path}: {size} bytes are not a whole number of {_CIFAR_RECORD}-byte records of "
                "CIFAR-10's binary version; download it again"
            )
        records = np.frombuffer(file.read(), np.uint8).reshape(-1, _CIFAR_RECORD)
    images = records[:, 1:].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, or in UTF-16 or UTF-32 if it starts with a byte-order mark.

    The mark is not part of the text, and every line ends with a single newline character.
    """
    with _opened(path) as file:
        content = file.read()
    marked = (name for mark, name in _ENCODINGS.items() if content.startswith(mark))
    encoding = next(marked, "UTF-8")
    try:
        text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig")
        raise UserError(
            f"{path}: not {name} text (byte {error.start}); convert it to UTF-8"
        ) from None
    if "\0" in text:  # UTF-16 without its mark
        raise UserError(f"{path}: not UTF-8 text (it has zero bytes); convert it to UTF-8")
    if not text:
        raise UserError(f"{path}: is empty")
    return text


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            if not zipped:
                yield plain
                return
            with gzip.open(plain) as file:
                yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _chunks(file: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        size -= len(chunk)
        yield chunk
