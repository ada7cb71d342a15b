"""Data sets that fit in memory, as arrays; ``streaming.py`` reads larger ones."""

import pydoc_data.topics
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.trainer.data.readers import read_cifar, read_idx, read_text
from examples.trainer.errors import UserError, expand

_DEBIAN = Path("/usr/share/datasets")
_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag")
_FASHION = (*_FASHION, "Ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Dataset(NamedTuple):
    """Two splits, each a dict of arrays with the samples along the first axis.

    Classification: ``x`` uint8 images ``[n, height, width, channels]``, ``y`` int32 ``[n]``.
    Regression: ``x`` float32 ``[n, features]``, ``y`` float32 ``[n]``, both standardized.
    Text: ``x`` int32 ``[n, length + 1]``, indices into ``names``.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    names: tuple[str, ...]  # of the classes, or the characters
    mean: float = 0.0  # of the training images
    std: float = 1.0


def load(config: Any) -> Dataset:
    """The data set that ``config.dataset`` names; UserError if it is unknown or damaged."""
    if config.dataset not in _LOADERS:
        known = ", ".join([*_LOADERS, "shards"])
        raise UserError(f"config.dataset must be one of {known}, got {config.dataset!r}")
    return _LOADERS[config.dataset](config)


def kind(dataset: Dataset) -> str:
    """The kind of data, in words; it decides which tasks can learn from them."""
    x, y = dataset.train["x"], dataset.train.get("y")
    if y is None:
        return "text"
    rows = "images" if x.ndim == 4 else "rows of numbers" if x.ndim == 2 else "other arrays"
    return f"{rows} with {'targets' if y.dtype.kind == 'f' else 'labels'}"


def fingerprint(dataset: Dataset) -> int:
    """A CRC-32 of all contents, by which a run recognizes its data after they were moved."""
    found = zlib.crc32(repr(dataset.names).encode())
    for split in (dataset.train, dataset.test):
        for name, array in sorted(split.items()):
            found = zlib.crc32(repr((name, array.shape, array.dtype.str)).encode(), found)
            found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found


def _digits(config: Any) -> Dataset:
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
    return _images(dict(x=parts[0], y=parts[2]), dict(x=parts[1], y=parts[3]), _DIGITS)


def _mnist_like(name: str, names: tuple[str, ...], how_to_get: str) -> Callable[[Any], Dataset]:
    def split(folder: Path, prefix: str) -> dict[str, np.ndarray]:
        try:
            return read(folder, prefix)
        except UserError as error:
            raise UserError(f"{error}; {how_to_get}") from None

    def read(folder: Path, prefix: str) -> dict[str, np.ndarray]:
        x_path = _find(folder, f"{prefix}-images-idx3-ubyte")
        y_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
        x, y = read_idx(x_path), read_idx(y_path)
        if x.ndim != 3 or 0 in x.shape:
            raise UserError(f"{x_path}: need images [n, height, width], got {x.shape}")
        if y.shape != x.shape[:1]:
            raise UserError(
                f"{y_path}: need one label for each of {len(x)} images in {x_path.name}, got "
                f"shape {y.shape}"
            )
        _check_labels(y_path, y, len(names))
        return dict(x=x[..., None], y=y.astype(np.int32))

    def load(config: Any) -> Dataset:
        folder = expand(config.data_dir) if config.data_dir else _DEBIAN / name
        train, test = split(folder, "train"), split(folder, "t10k")
        if train["x"].shape[1:] != test["x"].shape[1:]:
            raise UserError(
                f"{folder}: training images are {train['x'].shape[1:3]}, test images "
                f"{test['x'].shape[1:3]}: the files are of different data sets"
            )
        return _images(train, test, names)

    return load


def _cifar10(config: Any) -> Dataset:
    how_to_get = (
        "download cifar-10-binary.tar.gz, unpack it and pass the folder of its .bin files with "
        "--config.data_dir=FOLDER"
    )

    def split(names: list[str]) -> dict[str, np.ndarray]:
        parts = []
        for name in names:
            try:
                path = _find(expand(config.data_dir), name)
                parts.append(read_cifar(path))
                _check_labels(path, parts[-1][1], len(_CIFAR))
            except UserError as error:
                raise UserError(f"{error}; {how_to_get}") from None
        x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return dict(x=x, y=y)

    train = split([f"data_batch_{i}.bin" for i in range(1, 6)])
    return _images(train, split(["test_batch.bin"]), _CIFAR)


def _diabetes(config: Any) -> Dataset:
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    x, y = load_diabetes(return_X_y=True, scaled=False)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=89, random_state=0)
    standard = lambda a, train: ((a - train.mean(0)) / train.std(0)).astype(np.float32)
    return Dataset(
        train=dict(x=standard(x_train, x_train), y=standard(y_train, y_train)),
        test=dict(x=standard(x_test, x_train), y=standard(y_test, y_train)),
        names=(),
    )


def _text(config: Any) -> Dataset:
    if config.text_file:
        text, source = read_text(expand(config.text_file)), config.text_file
    else:
        text, source = "\n".join(pydoc_data.topics.topics.values()), "Python's documentation"
    names = tuple(sorted(set(text)))
    lookup = {character: index for index, character in enumerate(names)}
    codes = np.array([lookup[character] for character in text], np.int32)
    length, cut = config.model.length, int(0.9 * len(codes))
    train, test = (_windows(part, length) for part in (codes[:cut], codes[cut:]))
    if not len(train) or not len(test):
        raise UserError(
            f"{source}: {len(text)} characters are too few for windows of "
            f"config.model.length={length}"
        )
    return Dataset(dict(x=train), dict(x=test), names)


def _windows(codes: np.ndarray, length: int) -> np.ndarray:
    """Windows in which each character is predicted once, from the earlier ones in its window."""
    count = max(len(codes) - 1, 0) // length
    starts = length * np.arange(count)[:, None]
    return codes[starts + np.arange(length + 1)]


def _images(
    train: dict[str, np.ndarray], test: dict[str, np.ndarray], names: tuple[str, ...]
) -> Dataset:
    mean, std = float(train["x"].mean()), float(train["x"].std())
    return Dataset(train, test, names, mean, max(std, 1e-6))


def _check_labels(path: Path, y: np.ndarray, classes: int) -> None:
    if y.max(initial=0) >= classes:
        where = int(np.argmax(y >= classes))
        raise UserError(f"{path}: label {y[where]} at position {where}, need 0 to {classes - 1}")


def _find(folder: Path, stem: str) -> Path:
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.exists():
            return candidate
    raise UserError(f"{folder / stem}[.gz]: no such file")


_FETCH = "download the four IDX files of {} and pass their folder with --config.data_dir=FOLDER"
_LOADERS = {
    "digits": _digits,
    "fashion_mnist": _mnist_like(
        "fashion-mnist",
        _FASHION,
        "on Debian: apt-get install dataset-fashion-mnist; otherwise "
        + _FETCH.format("Fashion-MNIST"),
    ),
    "mnist": _mnist_like("mnist", _DIGITS, _FETCH.format("MNIST")),
    "cifar10": _cifar10,
    "diabetes": _diabetes,
    "text": _text,
}
