"""Runs that are killed, stopped, out of disk or damaged end like an uninterrupted run."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from examples.trainer.data.shard_writer import write_shards
from examples.trainer.errors import UserError
from examples.trainer.run.checkpoints import Checkpoints
from trainer import forks
from trainer.helpers import arrays_in, assert_same_end, rows_of, steps_in, stopped, tree_of

pytestmark = pytest.mark.slow

EPOCHS, STEPS, LAST = 5, 11, 55
DIGITS = ["--config.tensorboard=False", f"--config.num_epochs={EPOCHS}"]
DIGITS += ["--config.model.hidden_sizes=(16,)", "--config.checkpoint_every=2"]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The same run, never interrupted, by the command itself."""
    workdir = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "examples.trainer", "--config=configs/mlp.py", *DIGITS]
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


def runs_end_the_same(server, folder, reference, options, killer, times, **kwargs):
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
    runs_end_the_same(server, tmp_path, whole, DIGITS, killer, 20)
    assert killer.while_writing >= 5


def test_steps_that_tune_themselves_killed_twice(server, tmp_path):
    """A resumed run keeps what nag_auto has found, also in the log."""
    options = [*DIGITS, "--config.optimizer.name=nag_auto"]
    run = server.start(tmp_path / "whole", *options)
    assert run.end() == 0, run.stderr
    killer = Killer(2)
    runs_end_the_same(server, tmp_path, tmp_path / "whole", options, killer, 2)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    (found,) = {
        name
        for name in arrays_in(tmp_path / "whole" / "checkpoints", LAST)
        if "learning_rate" in name
    }
    assert (
        json.loads(rows[-1])["learning_rate"]
        == arrays_in(tmp_path / "whole" / "checkpoints", LAST)[found]
    )


@pytest.fixture(scope="module")
def shards(server, tmp_path_factory):
    """Options of a run with BatchNorm on streamed images, and that run, never interrupted."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 6 * 32), ("test", 40)):
        x = rng.integers(0, 256, (rows, 8, 8, 1), np.uint8)
        x[::2, :4] //= 4
        write_shards(folder / name, [(x, np.arange(rows) % 2)], 50, 2)
    options = ["--config.dataset=shards", f"--config.data_dir={folder}", "--config.batch_size=32"]
    options += ["--config.num_epochs=3", "--config.checkpoint_every=1", "--config.log_every=1"]
    options += ["--config.model.channels=(2,)", "--config.tensorboard=False"]
    run = server.start(folder / "run", *options, name="resnet")
    assert run.end() == 0, run.stderr
    return options, folder / "run"


def test_streamed_runs_killed_six_times(server, shards, tmp_path):
    options, reference = shards
    killer = Killer(1)
    runs_end_the_same(server, tmp_path, reference, options, killer, 6, name="resnet")
    assert killer.while_writing >= 1
    assert any(name.startswith("rest.") for name in arrays_in(reference / "checkpoints", 18))


def has_saved(workdir):
    return lambda: (workdir / "checkpoints").exists() and steps_in(workdir / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_reports_it(server, whole, tmp_path, number):
    run = server.start(tmp_path / "run", *DIGITS)
    assert run.until(has_saved(tmp_path / "run"))
    run.send(number)
    assert run.end() == 1
    (step,) = re.fullmatch(stopped(LAST) + "\n", run.stderr).groups()
    assert steps_in(tmp_path / "run" / "checkpoints")[-1] == int(step)
    run = finish(server, tmp_path / "run")
    assert f"resuming from step {step}\n" in run.stdout
    assert_same_end(tmp_path / "run", whole)


def test_a_signal_before_the_first_step_of_a_resumed_run(server, halfway, whole):
    """There is nothing new to save, and saving it again would be refused."""
    run = server.start(halfway, *DIGITS)
    assert run.until(lambda: "resuming from step 54" in run.stdout)
    run.send(signal.SIGTERM)
    assert run.end() in (1, -signal.SIGTERM)
    assert "Traceback" not in run.stderr
    assert "was not written" not in run.stderr
    finish(server, halfway)
    assert_same_end(halfway, whole)


def test_a_second_ctrl_c_loses_nothing(server, whole, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    run = server.start(tmp_path / "run", *DIGITS)
    assert run.until(has_saved(tmp_path / "run"))
    run.until(lambda: any(checkpoints.glob("*-tmp*")))
    before = steps_in(checkpoints)[-1]
    run.send(signal.SIGINT)
    time.sleep(0.01)
    run.send(signal.SIGINT)
    assert run.end() == 1
    assert run.stderr.count("\n") == 1
    assert "run the same command again to resume" in run.stderr
    assert steps_in(checkpoints)[-1] >= before
    finish(server, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    """What is raised there goes to ``sys.unraisablehook`` and nowhere else."""
    program = """if True:
        import gc, signal, sys, threading, time
        from examples.trainer.cluster import signals

        start = threading.Thread.start

        def slowly(self):  # as on a busy machine
            start(self)
            time.sleep(0.1)

        def interrupt(phase, info):
            gc.callbacks.remove(interrupt)
            signal.raise_signal(signal.SIGINT)

        threading.Thread.start = slowly
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        sys.unraisablehook = signals.forget
        gc.disable()
        gc.callbacks.append(interrupt)
        try:
            gc.collect()
            for _ in range(1000):
                time.sleep(0.01)
        except KeyboardInterrupt:
            sys.exit(7)
    """
    assert subprocess.run([sys.executable, "-c", program], cwd=forks.ROOT).returncode == 7


def fails(server, workdir, message, *options, **kwargs):
    """One line, exit code 1, nothing changed where checkpoints and metrics are."""
    before = tree_of(workdir)
    run = server.start(workdir, *DIGITS, *options, **kwargs)
    assert run.end() == 1
    assert run.stderr.count("\n") == 1, run.stderr
    assert re.search(message, run.stderr), run.stderr
    after = tree_of(workdir)
    assert {path: after.get(path) for path in before} == before
    return run


def test_full_disk(server, halfway, whole):
    """Files of more than 3 kB cannot be written: those of checkpoints, not those of metrics."""
    message = r"checkpoints/55: could not be written: File too large; free some space and run .*\n$"
    fails(server, halfway, message, file_limit=3000)
    assert steps_in(halfway / "checkpoints") == [52, 54]
    finish(server, halfway)
    assert_same_end(halfway, whole)


def test_no_space_for_metrics(server, halfway, whole):
    (halfway / "metrics.tmp").symlink_to("/dev/full")
    fails(server, halfway, r"^error: .*No space left on device")
    (halfway / "metrics.tmp").unlink()
    finish(server, halfway)
    assert_same_end(halfway, whole)


def test_no_space_for_tensorboard(server, whole, tmp_path):
    """Of files of more than 3 kB the events are the first: ``whole`` has compiled everything."""
    options = ["--config.tensorboard=True", "--config.log_every=1", "--config.checkpoint_every=999"]
    fails(server, tmp_path, r"^error: .*events.* cannot be written: ", *options, file_limit=3000)
    assert 1 < len((tmp_path / "metrics.jsonl").read_text().splitlines()) < LAST


@pytest.mark.parametrize("obstacle", ["checkpoints", "best", "metrics.jsonl/", "config.json/"])
def test_unusable_workdir(server, tmp_path, obstacle):
    """A file where a folder must be, or a folder where a file must be."""
    path = tmp_path / obstacle
    path.mkdir() if obstacle.endswith("/") else path.write_text("in the way")
    fails(server, tmp_path, "^error: .*(Is a directory|cannot be used)")


def data_file(checkpoint):
    """The largest: the arrays."""
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def meta_file(checkpoint):
    return checkpoint / "meta" / "metadata"


# Of coroutines that it leaves behind when a file cannot be read; told to whichever test is next.
ORBAX_WARNS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGES = {
    "flipped": lambda c: flip(data_file(c), data_file(c).stat().st_size // 2),
    "truncated": lambda c: data_file(c).write_bytes(data_file(c).read_bytes()[:2000]),
    "deleted": lambda c: data_file(c).unlink(),
    "no arrays": lambda c: shutil.rmtree(c / "state"),
    "empty meta": lambda c: meta_file(c).write_text(""),
    "blank meta": lambda c: meta_file(c).write_text("{}"),
    "null meta": lambda c: meta_file(c).write_text("null"),
    "wrong meta": lambda c: meta_file(c).write_text(
        meta_file(c).read_text().replace('"epoch": 2.0', '"epoch": 3.0')
    ),
    "no meta": lambda c: shutil.rmtree(c / "meta"),
    "nothing": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@ORBAX_WARNS
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(halfway, name, capsys):
    folder = halfway / "checkpoints"
    template = {name: jax.numpy.asarray(a) for name, a in arrays_in(folder, 52).items()}
    before = tree_of(folder)
    DAMAGES[name](folder / "54")
    assert tree_of(folder) != before
    restored = Checkpoints(folder, 3).restore_newest(template)
    assert restored.step == 52
    assert all(np.array_equal(restored.state[name], template[name]) for name in template)
    assert "54: damaged" in capsys.readouterr().out
    assert steps_in(folder) == [52]
    assert (halfway / "set_aside" / "checkpoints-54").exists()


@ORBAX_WARNS
def test_no_flipped_bit_is_read(halfway):
    """Compression has no checksum: most of these would give other numbers, silently."""
    folder = halfway / "checkpoints"
    template = {name: jax.numpy.asarray(a) for name, a in arrays_in(folder, 54).items()}
    shutil.rmtree(folder / "52")
    rng, checkpoints = np.random.default_rng(0), Checkpoints(folder, 3)
    noticed = 0
    for path in (data_file(folder / "54"), meta_file(folder / "54")):
        content = path.read_bytes()
        for position in rng.integers(len(content), size=30):
            flip(path, position, rng.integers(8))
            try:
                state = checkpoints.restore_newest(template).state
            except UserError:
                noticed += 1
            else:  # a byte that nothing reads
                assert all(np.array_equal(state[name], template[name]) for name in template)
            path.write_bytes(content)
    assert noticed >= 45


def test_a_damaged_checkpoint_costs_only_time(server, halfway, whole):
    DAMAGES["flipped"](halfway / "checkpoints" / "54")
    for step in steps_in(halfway / "best"):
        DAMAGES["empty meta"](halfway / "best" / str(step))
    run = finish(server, halfway)
    assert "54: damaged" in run.stdout
    assert "trying the previous one" in run.stdout
    assert "resuming from step 52\n" in run.stdout
    assert tree_of(halfway / "set_aside" / "checkpoints-54")
    shutil.rmtree(halfway / "best")
    shutil.copytree(whole / "best", halfway / "best")
    assert_same_end(halfway, whole)


def test_all_checkpoints_damaged(server, halfway):
    for step in (52, 54):
        DAMAGES["truncated"](halfway / "checkpoints" / str(step))
    fails(server, halfway, r"no checkpoint can be read; .*/54: damaged")


def test_a_checkpoint_of_another_config(server, halfway):
    message = r"config\.seed is 0, here 1; choose another --workdir"
    fails(server, halfway, message, "--config.seed=1")
    (halfway / "config.json").unlink()
    fails(server, halfway, message, "--config.seed=1")
    wider = "--config.model.hidden_sizes=(17,)"
    fails(server, halfway, r"config\.model\.hidden_sizes is \[16\], here \[16, 17\]", wider)
    assert not (halfway / "config.json").exists()


def test_killed_before_the_best_is_copied(server, whole, tmp_path):
    """Between the last checkpoint and its copy in best/, and before anything is drawn."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "curves.png").unlink()
    (workdir / "results.json").unlink()
    assert steps_in(whole / "best") == [LAST]
    shutil.rmtree(workdir / "best")
    finish(server, workdir)
    assert_same_end(workdir, whole)


def test_the_newest_and_the_best_are_kept(server, whole, tmp_path):
    assert steps_in(whole / "checkpoints") == [52, 54, 55]
    options = ["--config.keep=2", "--config.learning_rate=10.0", "--config.schedule=constant"]
    finish(server, tmp_path, *options)
    assert steps_in(tmp_path / "checkpoints") == [54, 55]
    results = {row["step"]: row["test_accuracy"] for row in rows_of(tmp_path)}
    assert steps_in(tmp_path / "best") == [max(results, key=results.__getitem__)] != [55]


def test_no_save_is_refused_silently(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    state = {"x": jax.numpy.arange(3)}
    checkpoints.save(5, state, {})
    checkpoints.wait()
    for step in (5, 4):
        with pytest.raises(UserError, match=f"/{step}: was not written: it or a later one exists"):
            checkpoints.save(step, state, {})
    checkpoints.close()
    assert steps_in(tmp_path) == [5]


def test_runs_move_between_numbers_of_devices(server, tmp_path):
    options = ["--config.keep=9", "--config.num_epochs=3", "--config.checkpoint_every=11"]
    finish(server, tmp_path / "8", *options, environment=forks.on_devices(8))
    expected = rows_of(tmp_path / "8")
    folder = tmp_path / "8" / "checkpoints"
    saved = arrays_in(folder, 22)
    for step in steps_in(folder):
        if step > 22:
            shutil.rmtree(folder / str(step))
    (tmp_path / "8" / "curves.png").unlink()
    for count in (4, 1):
        workdir = tmp_path / str(count)
        shutil.copytree(tmp_path / "8", workdir)
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        template = {name: jax.device_put(np.asarray(a), replicated) for name, a in saved.items()}
        state = Checkpoints(workdir / "checkpoints", 3).restore_newest(template).state
        for name, array in saved.items():
            assert len(state[name].devices()) == count
            assert np.asarray(state[name]).tobytes() == np.asarray(array).tobytes()
        run = finish(server, workdir, *options, environment=forks.on_devices(count))
        assert "resuming from step 22" in run.stdout
        for ours, theirs in zip(rows_of(workdir), expected, strict=True):
            assert ours == (theirs if theirs["step"] <= 22 else pytest.approx(theirs, rel=1e-5))


def test_a_loss_that_is_not_finite(server, tmp_path):
    wild = ["--config.learning_rate=10000.0"]
    workdir = tmp_path / "stop"
    run = server.start(workdir, *DIGITS, *wild)
    assert run.end() == 1
    assert re.fullmatch(r"error: the loss .* was not finite in .*\n", run.stderr)
    steps = steps_in(workdir / "checkpoints")
    print(steps, run.stderr)
    fails(server, workdir, "was not finite", *wild)
    assert steps_in(workdir / "checkpoints") == steps != []
    finish(server, tmp_path / "skip", *wild, "--config.nonfinite=skip")
    arrays = arrays_in(tmp_path / "skip" / "checkpoints", LAST)
    assert arrays["skipped"] > 0
    assert all(np.isfinite(array).all() for array in arrays.values())
