"""What several tests of the trainer use: a small config, small data, and what a run left behind."""

import gzip
import json
import struct
from importlib import import_module
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from examples.trainer import optimizer

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("[a-z]*.py") if p.stem != "default")
OPTIMIZERS = list(optimizer.OPTIMIZERS)


def config(name="mlp", **changes):
    result = import_module(f"configs.{name}").get_config()
    result.tensorboard, result.num_epochs, result.devices = False, 2, 1
    with result.unlocked():
        result.update(changes)
    return result


def change(chosen, name, value):
    *groups, field = name.split(".")
    for group in groups:
        chosen = chosen[group]
    chosen[field] = value


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stopped(total):
    """What a run prints that a signal has stopped; a group matches its step."""
    how = "everything is saved; run the same command again to resume"
    return rf"stopped at step (\d+) of {total}; {how}"


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def arrays_in(folder, step):
    manager = ocp.CheckpointManager(folder)
    arrays = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    manager.close()
    return arrays["state"]


def tree_of(folder):
    """Every file and what is in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_end(workdir, reference):
    """Bit for bit: the state, the rows, the best checkpoint and what is drawn of it."""
    for folder in ("checkpoints", "best"):
        last = steps_in(reference / folder)[-1]
        assert steps_in(workdir / folder)[-1] == last
        ours, theirs = (arrays_in(run / folder, last) for run in (workdir, reference))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert np.asarray(ours[name]).tobytes() == np.asarray(array).tobytes(), name
    for name in ("metrics.jsonl", "results.json", "config.json"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes(), name
    for name in ("curves.png", "confusion.png"):
        assert (workdir / name).exists()
    assert not list(workdir.glob("*/*.orbax-checkpoint-tmp*"))


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


def cifar_bytes(count, rng=RNG):
    records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(count) % 10
    return records


def write_cifar(folder, **changes):
    records = {f"data_batch_{i}": cifar_bytes(6) for i in range(1, 6)} | {
        "test_batch": cifar_bytes(4)
    }
    for name, array in records.items():
        (folder / f"{name}.bin").write_bytes(changes.get(name, array.tobytes()))
    return records
