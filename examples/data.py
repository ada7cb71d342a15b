"""Real data sets, read from files or from a package; every defect is named with its file."""

import gzip
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from examples.errors import UserError

_CHUNK = 1 << 20
_GZIP_RATIO = 1040  # deflate cannot expand by more
_DEBIAN = Path("/usr/share/datasets")
_HOW_TO_GET = {
    "fashion_mnist": "on Debian: apt-get install dataset-fashion-mnist; else fetch the four files "
    "of Fashion-MNIST and pass their folder with --config.data_dir=FOLDER",
    "mnist": "fetch the four IDX files of MNIST and pass their folder with "
    "--config.data_dir=FOLDER",
}


class Split(NamedTuple):
    """Images ``[n, height, width, channels]`` uint8 and their labels ``[n]`` int32."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Both splits, and what the model needs to know about them."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: float  # of the training images, in the units of the images
    std: float


def load(name: str, data_dir: str = "") -> Dataset:
    """Loads data set ``name``; UserError if it is unknown, missing or broken."""
    if name == "digits":
        return _digits()
    if name not in _HOW_TO_GET:
        known = ", ".join(["digits", *_HOW_TO_GET])
        raise UserError(f"config.dataset must be one of {known}, got {name!r}")
    folder = Path(data_dir) if data_dir else _DEBIAN / name.replace("_", "-")
    train, test = _idx_split(folder, "train", name), _idx_split(folder, "t10k", name)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{folder}: training images are {train.images.shape[1:3]}, test images "
            f"{test.images.shape[1:3]}: the files are of different data sets"
        )
    return _describe(train, test, _class_names(name))


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, plain or gzipped, without trusting its header.

    Raises:
      UserError: if the file is missing, is not IDX, is damaged, or is not as long as it says.
    """
    try:
        with _open(path) as file:
            return _parse_idx(path, file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]


def _parse_idx(path: Path, file: BinaryIO) -> np.ndarray:
    header = file.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or not 1 <= header[3] <= 4:
        raise UserError(f"{path}: not an IDX file (starts with {header.hex() or 'nothing'})")
    if header[2] != 8:
        raise UserError(f"{path}: IDX data type 0x{header[2]:02x}, need 0x08 (unsigned bytes)")
    sizes = file.read(4 * header[3])
    if len(sizes) < 4 * header[3]:
        raise UserError(f"{path}: ends within its header; fetch it again")
    shape = struct.unpack(f">{header[3]}I", sizes)
    expected = math.prod(shape)
    zipped = isinstance(file, gzip.GzipFile)
    limit = path.stat().st_size * (_GZIP_RATIO if zipped else 1)
    if expected > limit:
        raise UserError(
            f"{path}: its header promises {expected} bytes of data {shape}, more than the file "
            "can hold; it is truncated or not IDX"
        )
    found = b"".join(_chunks(file, expected + 1))
    if len(found) != expected:
        more = "more" if len(found) > expected else f"only {len(found)}"
        raise UserError(
            f"{path}: its header promises {expected} bytes of data {shape}, it holds {more}; "
            "fetch it again"
        )
    return np.frombuffer(found, np.uint8).reshape(shape)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        size -= len(chunk)
        yield chunk


def _idx_split(folder: Path, prefix: str, name: str) -> Split:
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte", name)
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte", name)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or 0 in images.shape:
        raise UserError(f"{images_path}: need images [n, height, width], got {images.shape}")
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"{labels_path}: need one label for each of {len(images)} images in "
            f"{images_path.name}, got shape {labels.shape}"
        )
    classes = len(_class_names(name))
    if labels.max() >= classes:
        where = int(np.argmax(labels >= classes))
        raise UserError(
            f"{labels_path}: label {labels[where]} at position {where}, need 0 to {classes - 1}"
        )
    return Split(images[..., None], labels.astype(np.int32))


def _find(folder: Path, stem: str, name: str) -> Path:
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.exists():
            return candidate
    raise UserError(f"{folder / stem}[.gz]: no such file; {_HOW_TO_GET[name]}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    parts: Any = train_test_split(
        digits.images.astype(np.uint8)[..., None],
        digits.target.astype(np.int32),
        test_size=360,
        stratify=digits.target,
        random_state=0,
    )
    train, test = Split(parts[0], parts[2]), Split(parts[1], parts[3])
    return _describe(train, test, _class_names("digits"))


def _describe(train: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    mean, std = float(train.images.mean()), float(train.images.std())
    return Dataset(train, test, class_names, mean, max(std, 1e-6))


def _class_names(name: str) -> tuple[str, ...]:
    if name == "fashion_mnist":
        text = "T-shirt,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
        return tuple(text.split(","))
    return tuple("0123456789")
