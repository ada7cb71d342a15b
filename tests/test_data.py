"""The readers: real files come back as they are, broken ones are named with what is wrong."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import data
from examples.errors import UserError

RNG = np.random.default_rng(0)


def idx_bytes(array, kind=8):
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_dataset(folder, zipped=False, **changes):
    """A small MNIST-like folder; ``changes`` replaces a file's bytes."""
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (40, 6, 5)),
        "train-labels-idx1-ubyte": np.arange(40) % 10,
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (20, 6, 5)),
        "t10k-labels-idx1-ubyte": np.arange(20) % 10,
    }
    for name, array in arrays.items():
        content = changes.get(name.split("-ubyte")[0].replace("-", "_"), idx_bytes(array))
        path = folder / (name + (".gz" if zipped else ""))
        path.write_bytes(gzip.compress(content) if zipped else content)
    return arrays


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_plain_and_gzipped_files(tmp_path, zipped):
    arrays = write_dataset(tmp_path, zipped)
    dataset = data.load("mnist", str(tmp_path))
    np.testing.assert_array_equal(dataset.train.images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert dataset.train.images.dtype == np.uint8
    assert dataset.mean == pytest.approx(arrays["train-images-idx3-ubyte"].mean())


def test_digits_are_the_real_ones_and_split_without_overlap():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert np.bincount(digits.test.labels).min() >= 34
    rows = lambda split: {x.tobytes() for x in split.images}
    assert not rows(digits.train) & rows(digits.test)
    np.testing.assert_array_equal(data.load("digits").train.labels, digits.train.labels)


BROKEN = {
    "empty file": ({"train_images_idx3": b""}, "train-images.*not an IDX file .*nothing"),
    "html": ({"train_images_idx3": b"<html>404</html>"}, "train-images.*not an IDX file"),
    "floats": (
        {"t10k_images_idx3": idx_bytes(np.zeros((20, 6, 5)), kind=13)},
        "t10k-images.*data type 0x0d, need 0x08",
    ),
    "truncated": (
        {"train_images_idx3": idx_bytes(np.zeros((40, 6, 5)))[:-7]},
        r"train-images.*promises 1200 bytes",
    ),
    "too long": (
        {"train_labels_idx1": idx_bytes(np.zeros(40)) + b"x"},
        "train-labels.*promises 40 bytes.*holds more",
    ),
    "header only": ({"train_images_idx3": b"\0\0\x08\x03\0\0"}, "ends within its header"),
    "swapped": (
        {"train_images_idx3": idx_bytes(np.zeros(40))},
        r"train-images.*need images \[n, height, width\], got \(40,\)",
    ),
    "fewer labels": (
        {"train_labels_idx1": idx_bytes(np.zeros(39))},
        "train-labels.*one label for each of 40 images",
    ),
    "label 10": (
        {"t10k_labels_idx1": idx_bytes(np.arange(20))},
        "t10k-labels.*label 10 at position 10, need 0 to 9",
    ),
    "other data set": (
        {"t10k_images_idx3": idx_bytes(np.zeros((20, 9, 9)))},
        "the files are of different data sets",
    ),
    "no images": (
        {"train_images_idx3": idx_bytes(np.zeros((0, 6, 5)))},
        r"need images .*got \(0, 6, 5\)",
    ),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path, case, zipped):
    changes, message = BROKEN[case]
    write_dataset(tmp_path, zipped, **changes)
    with pytest.raises(UserError, match=message):
        data.load("mnist", str(tmp_path))


def test_missing_and_damaged_files_say_how_to_get_them(tmp_path):
    with pytest.raises(
        UserError, match=r"train-images-idx3-ubyte\[\.gz\]: no such file; .*data_dir"
    ):
        data.load("mnist", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion_mnist", str(tmp_path))
    with pytest.raises(UserError, match=r"config\.dataset must be one of digits, fashion_mnist"):
        data.load("mnits")
    write_dataset(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-images.*damaged gzip file"):
        data.load("mnist", str(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"train-images.*cannot be read"):
        data.load("mnist", str(tmp_path))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_lying_header_costs_no_memory(tmp_path, zipped):
    content = struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**10, 2**10) + b"x" * 100
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than the file can hold"):
        data.read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(
    prefix=st.sampled_from([b"", b"\0\0\x08", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\x1f\x8b"]),
    tail=st.binary(max_size=60),
    zipped=st.booleans(),
)
def test_any_bytes_give_an_array_or_a_user_error(tmp_path_factory, prefix, tail, zipped):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    content = prefix + tail
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        array = data.read_idx(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert array.tobytes() in content
