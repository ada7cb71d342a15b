"""Several processes train as one: the same numbers, each its share of the data, none left over."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples.trainer import launch
from examples.trainer.data.shard_writer import write_shards
from trainer import forks
from trainer.helpers import arrays_in, assert_same_end, rows_of, steps_in, stopped

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 3, 6
OPTIONS = ["--config.tensorboard=False", f"--config.num_epochs={EPOCHS}", "--config.log_every=1"]
OPTIONS += ["--config.model.hidden_sizes=(16,)", "--config.checkpoint_every=2", "--config.keep=9"]
OPTIONS += ["--config.batch_size=32"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run on shards: six batches an epoch, with a bad record in the second share of one."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, rows in (("train", STEPS * 32), ("test", 40)):
        x = rng.standard_normal((rows, 12)).astype(np.float32)
        y = np.argmax(x[:, :3], 1)
        x[31] = np.nan
        write_shards(folder / name, [(x, y)], 50, 3)
    return [*OPTIONS, "--config.dataset=shards", f"--config.data_dir={folder}",
            "--config.on_bad=skip"]  # fmt: skip


class Launched:
    """``examples.trainer.launch`` as a process, with what it says in a file."""

    def __init__(self, server, workdir, *options, processes=2, devices=2):
        self.log = workdir.with_suffix(".log")
        command = [sys.executable, "-m", "examples.trainer.launch", f"--processes={processes}"]
        command += [f"--devices_per_process={devices}", "--", "--config=configs/mlp.py"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, f"--workdir={workdir}", *options],
                cwd=forks.ROOT, env=server.environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self):
        return self._process.wait(forks.LIMIT)

    def until(self, condition):
        deadline = time.monotonic() + forks.LIMIT
        while not condition():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def child(self, number):
        """The process id of a training process."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        ids = [int(child) for child in children.split()]
        named = lambda pid: f"--process_id={number}" in Path(f"/proc/{pid}/cmdline").read_text()
        return next(pid for pid in ids if named(pid))


@pytest.fixture(scope="module")
def whole(server, options, tmp_path_factory):
    """On 2 processes of 2 devices, never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run = Launched(server, workdir, *options)
    assert run.end() == 0, run.log.read_text()
    return workdir


def assert_close_end(workdir, reference):
    last = steps_in(reference / "checkpoints")[-1]
    ours, theirs = (arrays_in(run / "checkpoints", last) for run in (workdir, reference))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    for row, other in zip(rows_of(workdir), rows_of(reference), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_two_by_two_is_one_process(server, options, whole, tmp_path, devices):
    run = server.start(tmp_path / "run", *options, environment=forks.on_devices(devices))
    assert run.end() == 0, run.stderr
    assert_close_end(tmp_path / "run", whole)
    assert rows_of(whole)[-1]["bad_records"] == 1
    log = whole.with_suffix(".log").read_text()
    assert log.count("step: 1,") == 1  # only the first writes
    assert "Traceback" not in log


def test_in_memory_data_on_two_processes(server, tmp_path):
    digits = [*OPTIONS, "--config.num_epochs=1", "--config.batch_size=256"]
    launched = Launched(server, tmp_path / "two", *digits, devices=1)
    run = server.start(tmp_path / "one", *digits)
    assert (run.end(), launched.end()) == (0, 0), launched.log.read_text()
    assert_close_end(tmp_path / "two", tmp_path / "one")


def test_the_others_stop_when_one_is_killed(server, options, whole, tmp_path):
    workdir = tmp_path / "run"
    run = Launched(server, workdir, *options, "--config.num_epochs=1000", "--heartbeat=20")
    run.until(lambda: (workdir / "checkpoints" / "4").exists())
    os.kill(run.child(1), signal.SIGKILL)
    assert run.end() == 1
    log = run.log.read_text()
    assert "launch: process 1 was killed by SIGKILL; the others are stopped\n" in log
    assert "launch: run the same command again to resume from the last checkpoint\n" in log
    assert re.search("process 0 lost the others|distributed service detected fatal errors", log)
    assert "Traceback" not in log


def interrupted(whole, workdir, step):
    """The folder as a run leaves it that was killed after ``step``."""
    shutil.copytree(whole, workdir)
    (workdir / "curves.png").unlink()
    for folder in ("checkpoints", "best"):
        for later in (s for s in steps_in(workdir / folder) if s > step):
            shutil.rmtree(workdir / folder / str(later))


def test_a_run_resumes_after_a_kill_with_the_same_bits(server, options, whole, tmp_path):
    interrupted(whole, tmp_path / "run", 8)
    run = Launched(server, tmp_path / "run", *options)
    assert run.end() == 0, run.log.read_text()
    assert "resuming from step 8\n" in run.log.read_text()
    assert_same_end(tmp_path / "run", whole)


def test_a_run_resumes_in_one_process(server, options, whole, tmp_path):
    interrupted(whole, tmp_path / "run", 8)
    run = server.start(tmp_path / "run", *options)
    assert run.end() == 0, run.stderr
    assert "resuming from step 8\n" in run.stdout
    assert_close_end(tmp_path / "run", whole)


def test_a_signal_to_one_stops_all_after_the_same_step(server, options, tmp_path):
    workdir = tmp_path / "run"
    run = Launched(server, workdir, *options, "--config.num_epochs=1000")
    run.until(lambda: (workdir / "checkpoints" / "4").exists())
    os.kill(run.child(1), signal.SIGTERM)
    assert run.end() == 1
    found = re.findall(stopped(6000), run.log.read_text())
    assert len(found) == 2
    assert len(set(found)) == 1
    assert steps_in(workdir / "checkpoints")[-1] == int(found[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator=HOST:PORT, --num_processes and --process_id must"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            r"--process_id must be in \[0, 2\) for --num_processes=2, got 2",
        ),
        (["--distributed"], "the processes did not find each other: "),
        (["--distributed", "--heartbeat=0"], "--heartbeat must be at least 1 second, got 0"),
    ],
)
def test_flags_that_do_not_fit(server, tmp_path, flags, message):
    run = server.start(tmp_path / "run", *OPTIONS, *flags)
    assert run.end() == 1
    assert re.fullmatch(f"error: {message}.*\n", run.stderr), run.stderr
    assert not (tmp_path / "run").exists()


def test_processes_with_different_data(server, tmp_path):
    """Each would train on its own half of two data sets."""
    rng, port = np.random.default_rng(0), launch.free_port()
    processes = []
    for number in range(2):
        for name in ("train", "test"):
            x = rng.standard_normal((64, 12)).astype(np.float32)
            write_shards(tmp_path / str(number) / name, [(x, np.arange(64) % 3)], 50, 3)
        command = [sys.executable, "-m", "examples.trainer", "--config=configs/mlp.py", *OPTIONS]
        command += ["--config.dataset=shards", f"--config.data_dir={tmp_path / str(number)}"]
        command += [f"--workdir={tmp_path / 'run'}", f"--coordinator=localhost:{port}"]
        command += ["--num_processes=2", f"--process_id={number}"]
        environment = server.environment | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        processes.append(subprocess.Popen(
            command, cwd=forks.ROOT, env=environment, text=True, stderr=subprocess.PIPE
        ))  # fmt: skip
    errors = [process.communicate(timeout=forks.LIMIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    message = "error: the processes found different data for config.dataset=shards; give all of"
    assert all(message in error for error in errors), errors
    assert not (tmp_path / "run").exists()


def test_a_launcher_of_a_mistake(server, tmp_path):
    """The same command would make it again."""
    run = Launched(server, tmp_path / "run", *OPTIONS, "--config.optimizer.name=sgdm")
    assert run.end() == 1
    log = run.log.read_text()
    assert "error: config.optimizer.name must be one of nag, " in log
    assert "the others are stopped" in log
    assert "resume" not in log


def test_the_order_of_the_data_is_the_same_on_any_devices(server, options, tmp_path):
    """At a learning rate of 0 the counts of right answers tell which rows were in each batch."""
    still = [*options, "--config.learning_rate=0.0"]
    counts = {}
    for devices in (8, 1):
        workdir = tmp_path / str(devices)
        if devices == 1:  # resumes from the middle of the run on 8
            interrupted(tmp_path / "8", workdir, 8)
        run = server.start(workdir, *still, environment=forks.on_devices(devices))
        assert run.end() == 0, run.stderr
        assert ("resuming from step 8" in run.stdout) == (devices == 1)
        counts[devices] = [row["train_accuracy"] for row in rows_of(workdir)]
    assert counts[8] == counts[1]
    assert len(set(counts[8])) > 5
    assert json.dumps(counts[8][:STEPS]) != json.dumps(counts[8][STEPS : 2 * STEPS])
