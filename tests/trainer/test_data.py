"""The readers: real files come back as they are, broken ones are named with what is wrong."""

import codecs
import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs.default
from examples.trainer.data import datasets, readers
from examples.trainer.errors import UserError
from trainer.helpers import idx_bytes, write_cifar, write_dataset

RNG = np.random.default_rng(0)


def load(name, folder="", **changes):
    config = configs.default.get_config()
    config.dataset, config.data_dir = name, str(folder)
    config.update(changes)
    return datasets.load(config)


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_plain_and_gzipped_files(tmp_path, zipped):
    arrays = write_dataset(tmp_path, zipped)
    dataset = load("mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train["x"][..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.test["y"], arrays["t10k-labels-idx1-ubyte"])
    assert dataset.train["x"].dtype == np.uint8
    assert dataset.mean == pytest.approx(arrays["train-images-idx3-ubyte"].mean())


def test_digits_are_the_real_ones_and_split_without_overlap():
    digits = load("digits")
    assert digits.train["x"].shape == (1437, 8, 8, 1)
    assert digits.test["x"].shape == (360, 8, 8, 1)
    assert np.bincount(digits.test["y"]).min() >= 34
    rows = lambda split: {x.tobytes() for x in split["x"]}
    assert not rows(digits.train) & rows(digits.test)
    np.testing.assert_array_equal(load("digits").train["y"], digits.train["y"])


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
    with pytest.raises(UserError, match=message) as caught:
        load("mnist", tmp_path)
    if case != "other data set":
        assert "download the four IDX files" in str(caught.value)


def test_missing_and_damaged_files_say_how_to_get_them(tmp_path):
    with pytest.raises(
        UserError, match=r"train-images-idx3-ubyte\[\.gz\]: no such file; .*data_dir"
    ):
        load("mnist", tmp_path)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", tmp_path)
    with pytest.raises(UserError, match=r"config\.dataset must be one of digits, fashion_mnist"):
        load("mnits")
    write_dataset(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-images.*damaged gzip file"):
        load("mnist", tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"train-images.*cannot be read"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_lying_header_costs_no_memory(tmp_path, zipped):
    content = struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**10, 2**10) + b"x" * 100
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than the file can hold"):
        readers.read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_damaged_gzip_gives_an_array_or_a_user_error(tmp_path_factory, position, flip):
    content = bytearray(gzip.compress(idx_bytes(RNG.integers(0, 256, (30, 6, 5))), mtime=0))
    content[position % len(content)] ^= flip
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(content)
    try:
        readers.read_idx(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


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
        array = readers.read_idx(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert array.tobytes() in content


def test_reads_cifar_batches(tmp_path):
    records = write_cifar(tmp_path)
    dataset = load("cifar10", tmp_path)
    assert dataset.train["x"].shape == (30, 32, 32, 3)
    np.testing.assert_array_equal(dataset.test["y"], np.arange(4))
    # A record is a label, then the red plane by rows, then green, then blue.
    third = records["data_batch_2"][2]
    assert dataset.train["x"][8, 5, 7, 0] == third[1 + 5 * 32 + 7]
    assert dataset.train["x"][8, 5, 7, 2] == third[1 + 2 * 1024 + 5 * 32 + 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_batch_3": b"x" * 3072}, r"data_batch_3\.bin: 3072 bytes are not a whole number"),
        ({"test_batch": b""}, r"test_batch\.bin: 0 bytes"),
        ({"data_batch_1": b"\x0b" + bytes(3072)}, r"data_batch_1\.bin: label 11 at position 0"),
        ({"data_batch_1": gzip.compress(bytes(3073))}, "is gzipped; unpack cifar-10-binary"),
    ],
)
def test_broken_cifar_files_are_named(tmp_path, changes, message):
    write_cifar(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load("cifar10", tmp_path)
    assert "cifar-10-binary.tar.gz" in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=100) | st.binary(min_size=3073, max_size=3073))
def test_any_bytes_give_cifar_images_or_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "batch.bin"
    path.write_bytes(content)
    try:
        images, labels = readers.read_cifar(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert images.shape == (len(labels), 32, 32, 3)


def text_config(**changes):
    config = configs.default.get_config()
    config.update(dataset="text", **changes)
    return config


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_any_text_file_gives_windows_or_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "text"
    path.write_bytes(content)
    config = text_config(text_file=str(path))
    config.model.length = 8
    try:
        dataset = datasets.load(config)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        text = "".join(dataset.names[i] for i in dataset.train["x"][0])
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            assert len(text) == 9
        else:
            whole = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            assert text == whole[:9]


TEXT = "One line,\nand \u00e4 second \u20ac.\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_are_not_characters(tmp_path, encoding, newline):
    mark = "" if encoding.startswith("utf-8") else "\ufeff"
    content = (mark + TEXT.replace("\n", newline)).encode(encoding)
    (tmp_path / "text").write_bytes(content)
    assert readers.read_text(tmp_path / "text") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (codecs.BOM_UTF8, "text: is empty"),
        (codecs.BOM_UTF8 + b"a\xff", r"text: not UTF-8 text \(byte 1\); convert it to UTF-8"),
        (codecs.BOM_UTF16_LE + b"abc", r"text: not UTF-16 text \(byte 4\); convert it to UTF-8"),
        ("text".encode("utf-16-le"), r"text: not UTF-8 text \(it has zero bytes\); convert it"),
    ],
)
def test_text_that_cannot_be_decoded(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=message):
        readers.read_text(tmp_path / "text")


def test_a_byte_order_mark_is_not_learned(tmp_path):
    (tmp_path / "text").write_bytes(codecs.BOM_UTF8 + b"to be, or not to be\r\n" * 20)
    config = text_config(text_file=str(tmp_path / "text"))
    config.model.length = 8
    assert datasets.load(config).names == tuple(sorted(set("to be, or not to be\n")))


def test_text_windows_predict_each_character_once(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcdefghij" * 10)
    config = text_config(text_file=str(path))
    config.model.length = 4
    dataset = datasets.load(config)
    assert dataset.train["x"].shape == (22, 5)
    np.testing.assert_array_equal(dataset.train["x"][1:, 0], dataset.train["x"][:-1, -1])
    assert len(datasets.load(text_config()).train["x"]) > 5000
    with pytest.raises(UserError, match=r"missing: no such file"):
        datasets.load(text_config(text_file=str(tmp_path / "missing")))


def test_diabetes_is_standardized_by_its_training_part():
    dataset = load("diabetes")
    assert (dataset.train["x"].shape, dataset.test["x"].shape) == ((353, 10), (89, 10))
    np.testing.assert_allclose(dataset.train["x"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train["y"].std(), 1, rtol=1e-5)
    assert abs(dataset.test["y"].mean()) > 1e-3
