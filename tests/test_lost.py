"""Nothing is lost: runs that are killed, stopped, starved of disk or damaged end as if never."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import forks
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples import streaming
from examples.checkpoints import Checkpoints
from examples.errors import UserError

EPOCHS, STEPS, LAST = 5, 11, 55
DIGITS = ["--config.tensorboard=False", f"--config.num_epochs={EPOCHS}"]
DIGITS += ["--config.model.hidden_sizes=(16,)", "--config.checkpoint_every=2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = forks.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The same run, never interrupted, by the command itself."""
    workdir = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "examples.train", "--config=configs/mlp.py", *DIGITS]
    result = subprocess.run(
        [*command, f"--workdir={workdir}"], cwd=forks.ROOT, env=server.environment,
        capture_output=True, text=True, timeout=forks.LIMIT,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    return workdir


@pytest.fixture
def halfway(server, whole, tmp_path):
    """A folder with two checkpoints, as a run leaves it that is killed at step 44."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for name in ("curves.png", "confusion.png", "results.json"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "checkpoints" / str(LAST))
    return workdir


def finish(server, workdir, *options, **kwargs):
    run = server.start(workdir, *DIGITS, *options, **kwargs)
    assert run.end() == 0, run.stderr
    return run


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


class Killer:
    """Kills runs at random moments, every other time while a checkpoint is being written."""

    def __init__(self, seed):
        self._random, self._startup = random.Random(seed), None
        self.kills = self.while_writing = 0

    def kill(self, run, checkpoints):
        """False if the run ended before."""
        start = time.monotonic()
        if self.kills % 2 and self._startup:
            moment = start + self._random.uniform(0, 1.2 * self._startup)
            alive = run.until(lambda: time.monotonic() > moment)
        else:
            stale = set(checkpoints.glob("*-tmp*"))  # of the run before, until removed
            alive = run.until(lambda: not stale & set(checkpoints.glob("*-tmp*")))
            alive = alive and run.until(lambda: any(checkpoints.glob("*-tmp*")))
            self._startup = time.monotonic() - start
            if self._random.random() < 0.5:  # or the next one
                first = set(checkpoints.glob("*-tmp*"))
                alive = alive and run.until(lambda: set(checkpoints.glob("*-tmp*")) - first)
            time.sleep(self._random.uniform(0, 0.02))
        if alive:
            run.send(signal.SIGKILL)
        if run.end() == -signal.SIGKILL:
            self.kills += 1
            self.while_writing += any(checkpoints.glob("*-tmp*"))
        return run.end() < 0


def runs_end_alike(server, folder, reference, options, killer, times, **kwargs):
    """Kills as often as wanted, over as many runs as that takes, and compares each."""
    while killer.kills < times:
        workdir = folder / f"run-{killer.kills}"
        while killer.kills < times:
            run = server.start(workdir, *options, **kwargs)
            if not killer.kill(run, workdir / "checkpoints"):
                break
        run = server.start(workdir, *options, **kwargs)
        assert run.end() == 0, run.stderr
        assert_same_end(workdir, reference)


def test_killed_twenty_times(server, whole, tmp_path):
    killer = Killer(0)
    runs_end_alike(server, tmp_path, whole, DIGITS, killer, 20)
    assert killer.while_writing >= 5
    print(killer.while_writing, list(tmp_path.iterdir()))


@pytest.fixture(scope="module")
def shards(server, tmp_path_factory):
    """Options of a run with BatchNorm on streamed images, and that run, never interrupted."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 6 * 32), ("test", 40)):
        x = rng.integers(0, 256, (rows, 8, 8, 1), np.uint8)
        x[::2, :4] //= 4
        streaming.write_shards(folder / name, [(x, np.arange(rows) % 2)], 50, 2)
    options = ["--config.dataset=shards", f"--config.data_dir={folder}", "--config.batch_size=32"]
    options += ["--config.num_epochs=3", "--config.checkpoint_every=1", "--config.log_every=1"]
    options += ["--config.model.channels=(2,)", "--config.tensorboard=False"]
    run = server.start(folder / "run", *options, name="resnet")
    assert run.end() == 0, run.stderr
    return options, folder / "run"


def test_streamed_runs_killed_six_times(server, shards, tmp_path):
    options, reference = shards
    killer = Killer(1)
    runs_end_alike(server, tmp_path, reference, options, killer, 6, name="resnet")
    assert killer.while_writing >= 1
    assert any(name.startswith("rest.") for name in arrays_in(reference / "checkpoints", 18))
