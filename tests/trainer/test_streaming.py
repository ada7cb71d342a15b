"""Shards on disk: every row comes back once, bad ones are counted, broken files are named."""

import json
import pickle
import re
import resource
import struct
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import streaming as benchmark
from examples.trainer.data.shard_writer import write_shards
from examples.trainer.data.shards import ShardedSource, open_shards
from examples.trainer.data.streaming import BatchStream
from examples.trainer.errors import UserError


def make(folder, rows=103, classes=10, dtype=np.float32):
    """Writes shards of 20 rows of x that hold the row's number; returns ``(x, y)``."""
    x = np.broadcast_to(np.arange(rows)[:, None, None], (rows, 2, 3)).astype(dtype)
    y = np.arange(rows) % classes if classes else np.linspace(-1, 1, rows, dtype=np.float32)
    write_shards(folder, ((x[i : i + 17], y[i : i + 17]) for i in range(0, rows, 17)), 20, classes)
    return x, y


def change(folder, name, edit):
    """Replaces the array in one file by ``edit(array)``."""
    path = folder / f"{name}.npy"
    np.save(path, edit(np.load(path)))


def put(row, value):
    """An edit that sets one row."""

    def edit(array):
        array[row] = value
        return array

    return edit


def take(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


@contextmanager
def traced_memory():
    """Gives a function that returns the most bytes that Python held since it was last called."""

    def most():
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return peak

    tracemalloc.start()
    try:
        yield most
    finally:
        tracemalloc.stop()


def numbers(batches):
    return np.concatenate([batch["x"][:, 0, 0] for batch in batches]).astype(int)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"x", "y", "weight"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("classes", [10, 0])
def test_each_row_of_the_full_blocks_comes_once_in_each_epoch(tmp_path, dtype, classes):
    x, y = make(tmp_path, classes=classes, dtype=dtype)
    stream = BatchStream(open_shards(tmp_path), 7, seed=3)
    assert stream.steps_per_epoch == 14
    batches = take(stream, 42)
    orders = []
    for epoch in (batches[:14], batches[14:28], batches[28:]):
        rows = numbers(epoch)
        np.testing.assert_array_equal(np.sort(rows), np.arange(98))
        np.testing.assert_array_equal(rows.reshape(14, 7) - rows[::7, None], [range(7)] * 14)
        found = [np.concatenate([batch[name] for batch in epoch]) for name in ("x", "y", "weight")]
        np.testing.assert_array_equal(found[0], x[rows], strict=True)
        labels = y.astype(np.int32 if classes else np.float32)
        np.testing.assert_array_equal(found[1], labels[rows], strict=True)
        np.testing.assert_array_equal(found[2], np.ones(98, np.float32), strict=True)
        orders.append(rows.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(range(98)) not in orders
    assert stream.bad_records == {"nan": 0, "label": 0, "shard": 0}


def test_the_order_depends_on_the_seed_and_not_on_the_threads(tmp_path):
    make(tmp_path)
    source = open_shards(tmp_path)
    order = lambda *args: numbers(take(BatchStream(source, 7, *args), 28)).tolist()
    zero, one = order(0), order(1)
    assert zero[:98] != one[:98]
    assert zero[98:] != one[:98]  # an epoch is not the next seed's
    assert zero == order(0, 1, 0) == order(0, 3, 8) == order(0, 4, 1)


def test_a_block_may_span_several_shards(tmp_path):
    x, _ = make(tmp_path)
    source = open_shards(tmp_path)
    assert [(shard.start, shard.stop) for shard in source.shards][-2:] == [(80, 100), (100, 103)]
    for batch in take(BatchStream(source, 51, seed=0), 2):
        first = int(batch["x"][0, 0, 0])
        np.testing.assert_array_equal(batch["x"], x[first : first + 51])
    assert BatchStream(source, 103).steps_per_epoch == 1
    np.testing.assert_array_equal(source.read(19, 61)[0], x[19:61])


@pytest.mark.parametrize("position", [0, 1, 5, 13, 14, 15, 28, 31])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_restored_stream_resumes_bit_for_bit(tmp_path, position, prefetch):
    make(tmp_path)
    change(tmp_path, "x-00001", put([3, 15], np.nan))
    change(tmp_path, "y-00004", put(9, 10))
    source = open_shards(tmp_path)
    whole = BatchStream(source, 7, 5, 2, 4)
    expected = [next(whole) for _ in range(position)]
    state = json.loads(json.dumps(whole.get_state()))
    expected = take(whole, 20)
    restored = BatchStream(source, 7, 5, 1, prefetch)
    next(restored)  # restoring also works in the middle of another run
    restored.set_state(state)
    assert_same(take(restored, 20), expected)
    assert restored.bad_records == whole.bad_records == {"nan": 2, "label": 1, "shard": 0}
    assert restored.get_state() == whole.get_state() != state


def test_a_position_in_other_data_is_refused(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", rows=104)
    make(tmp_path / "c")
    source, longer = open_shards(tmp_path / "a"), open_shards(tmp_path / "b")
    state = BatchStream(source, 7, 0).get_state()
    for other, field in {
        BatchStream(source, 7, 1): "seed",
        BatchStream(source, 8, 0): "batch_size",
        BatchStream(longer, 7, 0): "rows",
    }.items():
        with pytest.raises(UserError, match=f"data position is for {field} .*new workdir"):
            other.set_state(state)
    for shard in (0, 1):  # as many rows, but not the same ones
        path = tmp_path / "c" / f"x-{shard:05d}.npy"
        content = path.read_bytes()
        path.write_bytes(b"")
        stream = BatchStream(open_shards(tmp_path / "c"), 7, 0)
        if shard == 1:
            with pytest.raises(UserError, match="data position is for shards"):
                stream.set_state(state)
        state = stream.get_state()
        path.write_bytes(content)


# file, row within it, value, dtype of the file, kind, classes, message
BAD_RECORDS = {
    "nan in x": ("x", 3, np.nan, "f4", "nan", 10, "x-00002.npy: row 3, or its target"),
    "inf in x": ("x", 0, -np.inf, "f4", "nan", 10, "x-00002.npy: row 0, or its target"),
    "label 10": ("y", 4, 10, "i8", "label", 10, "y-00002.npy: row 4 has label 10, need 0 to 9"),
    "label -1": ("y", 19, -1, "i1", "label", 10, "y-00002.npy: row 19 has label -1"),
    "no int32": ("y", 1, 2**32 + 1, "i8", "label", 10, "row 1 has label 4294967297"),
    "no int64": ("y", 1, 2**64 - 9, "u8", "label", 10, "y-00002.npy: row 1 has label"),
    "nan target": ("y", 5, np.nan, "f2", "nan", 0, "row 5, or its target in y-00002.npy, is not"),
    "no float32": ("y", 5, 1e200, "f8", "nan", 0, "row 5, or its target in y-00002.npy, is not"),
}


def make_with_a_bad_record(folder, case):
    """Returns the number of its row; the data set holds 14 full batches of 7."""
    letter, row, value, dtype, _, classes, _ = BAD_RECORDS[case]
    make(folder, classes=classes)
    change(folder, f"{letter}-00002", lambda array: put(row, value)(array.astype(dtype)))
    return 40 + row


def has_row(batch, row):
    """Whether ``row`` is in this block of seven, going by the rows that are not zeroed."""
    return batch["x"].max() // 7 == row // 7


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_zeroed_and_counted_once_when_handed_out(tmp_path, case):
    bad, none = make_with_a_bad_record(tmp_path, case), {"nan": 0, "label": 0, "shard": 0}
    one = none | {BAD_RECORDS[case][4]: 1}
    stream = BatchStream(open_shards(tmp_path), 7, 1, 2, 20)
    found = 0
    for _ in range(42):  # three epochs
        batch = next(stream)
        weight = np.ones(7)
        if has_row(batch, bad):
            found += 1
            weight[bad % 7] = 0
            assert not batch["x"][bad % 7].any()
            assert batch["y"][bad % 7] == 0
        np.testing.assert_array_equal(batch["weight"], weight)
        assert np.isfinite(batch["x"]).all()
        assert np.isfinite(batch["y"]).all()
        assert stream.bad_records == (one if found else none)
    assert found == 3
    stream.close()


def test_a_record_with_two_faults_is_counted_once(tmp_path):
    make(tmp_path)
    change(tmp_path, "x-00000", put([0, 1], np.nan))
    change(tmp_path, "y-00000", put([1, 2], 77))
    change(tmp_path, "y-00005", put(2, 77))  # row 102 is of no full batch
    stream = BatchStream(open_shards(tmp_path), 7)
    take(stream, 14)
    assert stream.bad_records == {"nan": 2, "label": 1, "shard": 0}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_refused_with_file_and_row(tmp_path, case):
    bad = make_with_a_bad_record(tmp_path, case)
    skipping = take(BatchStream(open_shards(tmp_path), 7, 1), 14)
    before = next(i for i, batch in enumerate(skipping) if has_row(batch, bad))
    stream = BatchStream(open_shards(tmp_path, on_bad="refuse"), 7, 1, 2, 20)
    assert_same([next(stream) for _ in range(before)], skipping[:before])
    for _ in range(2):  # it does not step over the bad batch
        with pytest.raises(UserError, match=re.escape(BAD_RECORDS[case][6])):
            next(stream)
        assert stream.get_state()["batches"] == before
        assert stream.get_state()["reader"] == {"next_index": before}
    stream.close()


def header(shape, descr="<f4", version=1):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
    )


def replace(content):
    return lambda path: path.write_bytes(content)


def edit_array(edit):
    return lambda path: np.save(path, edit(np.load(path)))


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def make_folder(path):
    path.unlink()
    path.mkdir()


class Bomb:
    """Unpickling this is noticed."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


# the damaged file, what happens to it, message; rows 40 to 59 are lost
BROKEN_SHARDS = {
    "missing x": ("x-00002", lambda path: path.unlink(), "no such file"),
    "missing y": ("y-00002", lambda path: path.unlink(), "no such file"),
    "folder": ("x-00002", make_folder, "no such file"),
    "empty": ("x-00002", replace(b""), "not a .npy file"),
    "text": ("y-00002", replace(b"1,2,3\n4,5,6\n"), "not a .npy file"),
    "pickle": ("x-00002", replace(pickle.dumps(Bomb())), "not a .npy file"),
    "objects": (
        "x-00002",
        replace(header((20, 2, 3), "|O") + pickle.dumps(Bomb()).ljust(960)),
        "promises 960 bytes",
    ),
    "zip": ("x-00002", replace(b"PK\x03\x04" + bytes(30)), "not a .npy file"),
    "ends in its header": ("x-00002", cut(50), "not a .npy file"),
    "truncated": ("x-00002", cut(-1), "promises 480 bytes .*holds 479"),
    "header only": ("y-00002", cut(128), "promises 160 bytes .*holds 0"),
    "too long": ("y-00002", lambda path: path.write_bytes(path.read_bytes() + b"x"), "holds 161"),
    "dtype": ("x-00002", edit_array(lambda x: x.astype("f8")), "float32, got .* float64"),
    "byte order": ("x-00002", edit_array(lambda x: x.astype(">f4")), "float32, got .* >f4"),
    "shape": ("x-00002", edit_array(lambda x: x[:, :1]), r"\(2, 3\) float32, got \(1, 3\)"),
    "float labels": ("y-00002", edit_array(lambda y: y * 1.0), "need integer labels"),
    "one-hot labels": ("y-00002", edit_array(lambda y: np.eye(10, dtype=int)[y]), "need integer"),
    "fewer labels": ("y-00002", edit_array(lambda y: y[1:]), "has 19 rows, x-00002.npy has 20"),
    "by columns": ("x-00002", edit_array(np.asfortranarray), "stored by columns"),
    "version 2": ("x-00002", replace(header((20, 2, 3), version=2) + bytes(480)), "format 1.0"),
    "negative": ("y-00002", replace(header((-1,), "<i8")), "promises -8 bytes"),
    "immense": ("y-00002", replace(header((2**70,), "<i8")), "promises 9444732965739290427392"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_a_broken_shard_is_refused_or_skipped_and_counted(tmp_path, case):
    make(tmp_path)
    name, damage, message = BROKEN_SHARDS[case]
    assert open_shards(tmp_path, "refuse").skipped == ()
    damage(tmp_path / f"{name}.npy")
    with pytest.raises(UserError, match=f"{name}.npy: .*{message}"):
        open_shards(tmp_path, "refuse")
    source = open_shards(tmp_path, "skip")
    assert len(source.skipped) == 1
    assert re.search(f"{name}.npy: .*{message}", source.skipped[0])
    stream = BatchStream(source, 83)
    rows = numbers(take(stream, 1))
    np.testing.assert_array_equal(rows, [*range(40), *range(60, 103)])
    assert stream.bad_records == {"nan": 0, "label": 0, "shard": 20}


@pytest.mark.parametrize(
    ("gone", "lost", "message"),
    [
        ([0], 20, "x-00000.npy: no such file"),
        ([1, 2], 40, "x-00001.npy: no such file"),
        ([5], 3, "promises 103 rows, the shards hold 100"),
        ([1, 4, 5], 43, "x-00001.npy: no such file"),
    ],
)
def test_missing_pairs_of_files_are_noticed(tmp_path, gone, lost, message):
    make(tmp_path)
    for number in gone:
        for letter in "xy":
            (tmp_path / f"{letter}-{number:05d}.npy").unlink()
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path, "refuse")
    source = open_shards(tmp_path)
    assert message in source.skipped[0]
    assert BatchStream(source, 7).bad_records["shard"] == lost


def test_a_folder_without_a_good_shard_is_refused_in_any_case(tmp_path):
    make(tmp_path, rows=20)
    (tmp_path / "x-00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"x-00000\.npy: not a \.npy file"):
        open_shards(tmp_path, "skip")
    (tmp_path / "x-00000.npy").unlink()
    (tmp_path / "y-00000.npy").unlink()
    with pytest.raises(UserError, match="promises 20 rows, the shards hold 0"):
        open_shards(tmp_path, "skip")
    with pytest.raises(UserError, match="on_bad must be 'skip' or 'refuse', got 'ignore'"):
        open_shards(tmp_path, "ignore")


META = {"rows": 103, "classes": 10, "shape": [2, 3], "dtype": "float32"}
BROKEN_META = {
    "not json": b"{rows: 103",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a list": b"[103, 10]",
    "field missing": {"rows": 103},
    "rows as text": META | {"rows": "103"},
    "no rows": META | {"rows": 0},
    "true rows": META | {"rows": True},
    "negative classes": META | {"classes": -1},
    "shape a number": META | {"shape": 6},
    "empty shape": META | {"shape": [2, 0]},
    "dtype unknown": META | {"dtype": "object"},
    "dtype a list": META | {"dtype": ["float32"]},
}


@pytest.mark.parametrize("case", BROKEN_META)
def test_a_broken_meta_file_is_refused(tmp_path, case):
    make(tmp_path)
    path, content = tmp_path / "meta.json", BROKEN_META[case]
    assert json.loads(path.read_bytes()) == META
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError, match=r"meta\.json: need rows >= 1, classes >= 0, shape, dtype"):
        open_shards(tmp_path, "skip")
    path.write_text(json.dumps(META | {"rows": 102}))
    with pytest.raises(UserError, match="promises 102 rows, the shards hold 103"):
        open_shards(tmp_path, "skip")
    path.unlink()
    with pytest.raises(UserError, match=r"meta\.json: No such file.*writing was interrupted"):
        open_shards(tmp_path, "skip")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_in_a_shard_give_data_or_a_user_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    make(folder, rows=40)
    path = folder / f"{data.draw(st.sampled_from('xy'))}-00001.npy"
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    start = data.draw(st.sampled_from([0, len(content), 10]))
    path.write_bytes(bytes(content)[: len(content) - start] + data.draw(st.binary(max_size=20)))
    source = open_shards(folder, "skip")
    batch = next(BatchStream(source, source.rows, 0, 1, 0))
    assert len(batch["x"]) in (20, 40)
    bad = batch["weight"] == 0
    assert not batch["x"][bad].any()
    assert np.isfinite(batch["x"]).all()
    assert set(batch["y"]) <= set(range(10))
    try:
        open_shards(folder, "refuse")
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert len(source.skipped) == 1
    else:
        assert not source.skipped


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 3), max_size=4).map(tuple),
    descr=st.sampled_from(["<f4", "<i8", "|O", "|V0", "<U0", "bogus", [("a", "<f4")], None]),
    text=st.none() | st.text(max_size=60) | st.just("(" * 500) | st.just("{'a': 0x" + "f" * 9000),
)
def test_a_lying_header_costs_no_memory(tmp_path_factory, shape, descr, text):
    folder = tmp_path_factory.mktemp("lie")
    make(folder, rows=40)
    path = folder / "x-00001.npy"
    lie = header(shape, descr)
    if text is not None:
        lie = lie[:8] + struct.pack("<H", len(text.encode())) + text.encode()
    path.write_bytes(lie + b"x" * 100)
    with traced_memory() as most:
        with pytest.raises(UserError, match=r"x-00001\.npy: "):
            open_shards(folder, "refuse")
        assert most() < 2**20


def resident_bytes():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def test_reading_and_writing_take_the_memory_of_a_few_batches(tmp_path):
    rows, chunk = 2**16, 2**12  # 64 MiB of x in shards of 8 MiB, 1 MiB a batch
    labels = np.zeros(chunk, np.int32)
    chunks = ((np.full((chunk, 256), i, np.float32), labels) for i in range(rows // chunk))
    with traced_memory() as most:
        write_shards(tmp_path, chunks, rows // 8, 10)
        assert 8 * 2**20 < most() < 20 * 2**20
        stream = BatchStream(open_shards(tmp_path), 2**10, 0, 2, 2)
        next(stream)
        before = resident = resident_bytes()
        for _ in range(2 * stream.steps_per_epoch):
            next(stream)
            resident = max(resident, resident_bytes())
        assert 2**20 < most() < 12 * 2**20
    assert resident - before < 24 * 2**20  # maps that stay open would take all 64
    stream.close()


def test_batches_are_read_ahead_in_background_threads(tmp_path, monkeypatch):
    make(tmp_path)
    readers, read, source = [], ShardedSource.read, open_shards(tmp_path)

    def counted(self, *args):
        if self is source:  # threads of earlier tests may still be at their last batch
            readers.append(threading.current_thread())
        return read(self, *args)

    monkeypatch.setattr(ShardedSource, "read", counted)
    stream = BatchStream(source, 7, 0, 2, 5)
    next(stream)
    until = time.monotonic() + 600
    while len(readers) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(readers) == 6  # the one handed out and five ahead, with nobody asking
    assert threading.main_thread() not in readers
    stream.close()
    readers.clear()
    next(BatchStream(source, 7, 0, 2, 0))
    assert readers == [threading.main_thread()]


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    make(tmp_path)
    stream = BatchStream(open_shards(tmp_path), 7, 0, 1, 0)
    for path in tmp_path.glob("x-*.npy"):
        path.write_bytes(path.read_bytes()[:130])
    with pytest.raises(UserError, match=r"x-0000\d.npy: changed since it was opened"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 104}, r"batch_size must be 1 to 103 \(rows on disk\), got 104"),
        ({"batch_size": 0}, "batch_size must be 1 to 103"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"seed": 2**32}, "seed must be 0 to"),
        ({"num_threads": 0}, "num_threads >= 1"),
        ({"prefetch": -1}, "prefetch >= 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        BatchStream(open_shards(tmp_path), **{"batch_size": 7, **options})


x, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
WRONG_CHUNKS = {
    "none": ([], 10, "there are no rows"),
    "empty": ([(x[:0], y[:0])], 10, "there are no rows"),
    "other shape": ([(x, y), (x[:, :2], y)], 10, r"needs x of \[rows, \*\(3,\)\] float32, .*got"),
    "other dtype": ([(x, y), (x.astype("f2"), y)], 10, "needs x of .* float32, .*float16"),
    "other labels": ([(x, y), (x, y.astype("i8"))], 10, "needs y of .* int32, .*int64"),
    "fewer labels": ([(x, y), (x, y[1:])], 10, "4 rows of x and 3 of y"),
    "float64": ([(x.astype("f8"), y)], 10, "float32, float16, uint8, got .*float64"),
    "scalar": ([(x[0, 0], y)], 10, r"need x of shape \[rows, \.\.\.\]"),
    "no width": ([(x[:, :0], y)], 10, r"need x of shape \[rows, \.\.\.\]"),
    "float labels": ([(x, x[:, 0])], 10, "need integer labels"),
    "integer targets": ([(x, y)], 0, "need float targets"),
    "negative classes": ([(x, y)], -1, "classes >= 0"),
}


@pytest.mark.parametrize("case", WRONG_CHUNKS)
def test_chunks_that_do_not_fit_are_refused_and_leave_no_data_set(tmp_path, case):
    chunks, classes, message = WRONG_CHUNKS[case]
    with pytest.raises(UserError, match=message):
        write_shards(tmp_path, chunks, 3, classes)
    with pytest.raises(UserError, match="not a data set, or its writing was interrupted"):
        open_shards(tmp_path)


def test_nothing_is_overwritten_and_an_interrupted_write_is_no_data_set(tmp_path):
    def stops():
        yield x, y
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "part", stops(), 3, 10)
    assert (tmp_path / "part" / "x-00000.npy").exists()
    with pytest.raises(UserError, match="writing was interrupted"):
        open_shards(tmp_path / "part")
    with pytest.raises(UserError, match="part: is not empty"):
        write_shards(tmp_path / "part", [(x, y)], 3, 10)
    with pytest.raises(UserError, match="rows_per_shard >= 1"):
        write_shards(tmp_path / "new", [(x, y)], 0, 10)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot be written: .*File exists"):
        write_shards(tmp_path / "file", [(x, y)], 3, 10)


def test_a_full_disk_is_a_user_error_and_leaves_no_data_set(tmp_path):
    many = np.zeros((2**14, 3), np.float32), np.zeros(2**14, np.int32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # stands for the full disk
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write_shards(tmp_path, [many], 2**14, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(UserError, match="not a data set"):
        open_shards(tmp_path)


def test_the_benchmark_learns_and_reports_memory(tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["streaming", "--rows=200000", f"--result={result}"])
    benchmark.main()
    found = json.loads(result.read_bytes())
    assert found["bytes_on_disk"] > 200_000 * 33 * 4
    assert found["steps"] == 48
    assert found["test_accuracy"] > found["teacher_accuracy"] - 0.05 > 0.7
    for percent in ("10 %", "50 %", "100 %"):
        assert found["memory_bytes"][percent]["VmRSS"] > found["memory_bytes"][percent]["RssAnon"]
        assert 0 < found["python_heap_bytes"][percent] < 10_000_000
