"""Sweeps of the learning rate, reductions on a plateau, and runs that end before their time."""

import json
import shutil

import numpy as np
import pytest

from examples.trainer.errors import UserError
from examples.trainer.loop import stopping, train
from examples.trainer.loop.lr_finder import find_learning_rate, running_mean
from trainer.helpers import config, rows_of, steps_in


class Accuracy:
    score, higher_is_better = "accuracy", True


class Loss:
    score, higher_is_better = "loss", False


def history(name, values):
    return [{f"test_{name}": value} if value is not None else {} for value in values]


def set_to(**changes):
    result = config()
    for group, fields in changes.items():
        result[group].update(fields)
    return result


@pytest.mark.parametrize(
    ("task", "fields", "values", "over"),
    [
        (Accuracy, dict(patience=2), [50, 60, 59, None, 58], True),
        (Accuracy, dict(patience=2), [50, 60, 59, 61, 60], False),
        (Accuracy, dict(patience=2, min_change=2.0), [50, 60, 61, 62], True),
        (Accuracy, dict(patience=2, min_change=0.5), [50, 60, 61, 62], False),
        (Loss, dict(patience=2), [1.0, 0.5, 0.6, 0.7], True),
        (Loss, dict(patience=2), [1.0, 0.5, 0.6, 0.4], False),
        (Accuracy, dict(target=90.0), [50, 91, 80], True),
        (Accuracy, dict(target=90.0), [50, 89.9], False),
        (Loss, dict(target=0.1), [1.0, 0.1], True),
        (Loss, dict(target=0.1), [1.0, 0.2], False),
        (Accuracy, dict(), [50, 40, 30, 20, 10], False),
        (Accuracy, dict(patience=1, target=1.0), [], False),
    ],
)
def test_when_a_run_is_over(task, fields, values, over):
    rows = history(task.score, values)
    assert bool(stopping.reason_to_end(set_to(stop=fields), task, rows)) == over


def test_when_the_learning_rate_falls():
    chosen = set_to(plateau=dict(patience=2, factor=0.5))
    values = [1, 2, 2, 2, 2, 2, 3, 2, 2, 2]
    scales = [
        stopping.learning_rate_scale(chosen, Accuracy, history("accuracy", values[:n]))
        for n in range(len(values) + 1)
    ]
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    off = set_to(plateau=dict(patience=0))
    assert stopping.learning_rate_scale(off, Accuracy, history("accuracy", values)) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "clip_norm"), [("nag", 0.0), ("nag", 1e3), ("adam", 0.0)])
def test_a_plateau_lowers_the_rate_of_the_next_update(tmp_path, name, clip_norm):
    """At a change that nothing reaches, each evaluation after the first halves it."""
    chosen = config(num_epochs=4, schedule="constant", warmup_epochs=0.0, learning_rate=0.01)
    chosen.optimizer.name, chosen.clip_norm = name, clip_norm
    chosen.plateau.update(patience=1, factor=0.5, min_change=1000.0)
    rows = train.train_and_evaluate(chosen, tmp_path / "run")
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.005, 0.0025], rtol=1e-6)
    chosen.plateau.patience = 0
    other = train.train_and_evaluate(chosen, tmp_path / "other")
    same = [a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
            for a, b in zip(rows, other, strict=True)]  # fmt: skip
    assert same == [True, True, False, False]
    # Killed after the second epoch, it resumes with the same numbers.
    for folder in ("checkpoints", "best"):
        for step in (s for s in steps_in(tmp_path / "run" / folder) if s > 22):
            shutil.rmtree(tmp_path / "run" / folder / str(step))
    (tmp_path / "run" / "curves.png").unlink()
    chosen.plateau.patience = 1
    assert train.train_and_evaluate(chosen, tmp_path / "run") == rows


@pytest.mark.slow
def test_a_run_that_ends_early_is_finished(tmp_path, capsys):
    chosen = config(num_epochs=30)
    chosen.stop.target = 94.0
    rows = train.train_and_evaluate(chosen, tmp_path)
    assert rows[-1]["test_accuracy"] >= 94 > rows[-2]["test_accuracy"]
    assert rows[-1]["epoch"] < 30
    assert steps_in(tmp_path / "checkpoints")[-1] == rows[-1]["step"]
    assert (tmp_path / "confusion.png").exists()
    assert "test_accuracy has reached 94" in capsys.readouterr().out
    assert train.train_and_evaluate(chosen, tmp_path) == rows == rows_of(tmp_path)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sweep_finds_a_rate_that_trains(tmp_path, capsys):
    chosen = config(find_lr=True)
    found = find_learning_rate(chosen, tmp_path)
    assert f"--config.learning_rate={found['suggestion']:g}" in capsys.readouterr().out
    assert json.loads((tmp_path / "find_lr.json").read_text()) == found
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoints").exists()
    assert found["rates"][0] == pytest.approx(1e-5)
    assert len(found["rates"]) < 200  # it ended where the loss explodes
    ratios = np.divide(found["rates"][1:], found["rates"][:-1])
    np.testing.assert_allclose(ratios, 1e6 ** (1 / 199))
    rate = found["suggestion"]
    assert 0.01 < rate < 0.2
    tuned = train.train_and_evaluate(config(num_epochs=12, learning_rate=rate), tmp_path)
    assert tuned[-1]["test_accuracy"] >= 96


def test_a_sweep_where_nothing_works(tmp_path):
    chosen = config(find_lr=True)
    chosen.sweep.update(low=1e8, high=1e9)
    with pytest.raises(UserError, match=r"does not fall from config\.sweep\.low=1e\+08"):
        find_learning_rate(chosen, tmp_path)


def test_the_running_mean_is_unbiased():
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert running_mean([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stop=dict(patience=-1)), r"config\.stop\.patience must be at least 0, got -1"),
        (dict(plateau=dict(factor=1.0)), r"config\.plateau\.factor must be in \(0, 1\), got 1"),
        (dict(plateau=dict(min_change=-1.0)), r"config\.plateau\.min_change must be at least 0"),
        (dict(sweep=dict(low=0.0)), r"config\.sweep needs 0 < low < high"),
        (
            dict(plateau=dict(patience=1), optimizer=dict(name="nag_then_sgd")),
            "nag_then_sgd sets its own learning rate",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(set_to(**changes), tmp_path)
