"""The trainer learns, repeats itself to the bit, and answers mistakes with one line."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import configs.mlp
from examples import train
from examples.errors import UserError

ROOT = Path(__file__).parent.parent


def config(**changes):
    result = configs.mlp.get_config()
    result.num_epochs = 2
    result.update(changes)
    return result


def run_command(workdir, *options):
    command = [sys.executable, "-m", "examples.train", "--config=configs/mlp.py", *options]
    return subprocess.run(
        [*command, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_learns_digits_and_leaves_its_files(tmp_path):
    history = train.train_and_evaluate(config(num_epochs=12), tmp_path)
    assert history[-1]["test_accuracy"] >= 97.0
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == history
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["num_epochs"] == 12


@pytest.mark.parametrize("convention", ["optax", "sutskever"])
def test_same_seed_same_numbers_other_seed_others(tmp_path, convention):
    one = config()
    one.optimizer.convention = convention
    other = one.copy_and_resolve_references()
    other.seed = 1
    first = train.train_and_evaluate(one, tmp_path / "a")
    assert train.train_and_evaluate(one, tmp_path / "b") == first
    assert train.train_and_evaluate(other, tmp_path / "c") != first


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    first = train.train_and_evaluate(config(), tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert train.train_and_evaluate(config(), tmp_path) == first
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run of another config"):
        train.train_and_evaluate(config(learning_rate=0.01), tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])  # as a kill would leave it
    assert train.train_and_evaluate(config(), tmp_path) == first


def test_evaluation_counts_every_sample_once():
    """Sizes that do not divide: 7 batches of 3 over 20 samples, the last one padded."""
    split = train.data.Split(np.arange(20, dtype=np.float32)[:, None], np.zeros(20, np.int32))
    apply = lambda params, images: np.float32([[0.0, 0.0]]) + (images > 12.5) * params
    metrics = train.make_test(apply)(np.float32([[0.0, 1.0]]), jax.device_put(split), 3)
    summary = train.summarize("test", metrics)
    assert float(metrics.samples) == 20
    assert summary["test_accuracy"] == pytest.approx(100 * 13 / 20)
    expected = (13 * np.log(2) + 7 * np.log1p(np.e)) / 20
    assert summary["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "config.batch_size must be at least 1, got 0"),
        ({"batch_size": 5000}, "config.batch_size=5000 is more than the 1437 training samples"),
        ({"num_epochs": -1}, "config.num_epochs must be at least 1"),
        ({"warmup_epochs": -1.0}, "config.warmup_epochs must be at least 0"),
        ({"momentum": 1.0}, r"config: momentum must be in \[0, 1\), got 1"),
        ({"learning_rate": -0.1}, r"config: learning_rate must be in \[0, inf\), got -0.1"),
        ({"decay": "l1"}, "config: decay must be one of 'coupled', 'decoupled', got 'l1'"),
        ({"schedule": "step"}, "config.schedule must be one of constant, cosine, got 'step'"),
        ({"model": {"name": "mpl"}}, "config.model.name must be mlp, got 'mpl'"),
        ({"optimizer": {"name": "sgdm"}}, "config.optimizer.name must be nag, got 'sgdm'"),
        ({"learning_rate": 1e4}, r"the loss is nan in epoch \d; try a smaller"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config(**changes), tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.learnin_rate=1", 'Did you mean "learning_rate"'),
        ("--config.learning_rate=fast", "could not convert string to float: 'fast'"),
        ("--config.optimizer.name=sgdm", "config.optimizer.name must be nag"),
        ("--config=configs/missing.py", "No such file or directory: 'configs/missing.py'"),
        ("--learning_rate=1", "Unknown command line flag 'learning_rate'"),
        ("extra", "unknown arguments extra"),
    ],
)
def test_command_line_mistakes_give_one_line(tmp_path, option, message):
    result = run_command(tmp_path / "run", option)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_unusable_workdir_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_command(tmp_path / "file" / "run")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "cannot be used: Not a directory" in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"
