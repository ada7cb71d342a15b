"""The trainer learns, is reproducible bit for bit, resumes, and reports wrong values."""

import json
import re
from collections import Counter
from itertools import pairwise

import chex
import jax
import numpy as np
import optax
import pytest

import nag_jax
from benchmarks import collectives
from examples.trainer.data import datasets
from examples.trainer.data.shard_writer import write_shards
from examples.trainer.errors import UserError
from examples.trainer.loop import train
from examples.trainer.loop.evaluation import make_evaluate, make_refresh
from examples.trainer.loop.setup import set_up
from examples.trainer.loop.steps import epoch_order, initial_state, make_update
from examples.trainer.optimizer import make_optimizer
from examples.trainer.run.checkpoints import Checkpoints
from examples.trainer.tasks.choose import make_task
from trainer.helpers import (
    OPTIMIZERS,
    RECIPES,
    ROOT,
    config,
    rows_of,
    write_cifar,
    write_dataset,
)


@pytest.mark.slow
def test_learns_digits_and_leaves_its_files(tmp_path):
    history = train.train_and_evaluate(config(num_epochs=12, tensorboard=True), tmp_path)
    assert history[-1]["test_accuracy"] >= 97.0
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]
    assert rows_of(tmp_path) == history
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert {"learning_rate", "momentum", "test_accuracy_at_params"} <= history[0].keys()
    for name in ("curves.png", "confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["num_epochs"] == 12
    matrix = np.array(json.loads((tmp_path / "results.json").read_text())["confusion"])
    assert matrix.sum() == 360
    assert 100 * matrix.trace() / 360 == pytest.approx(history[-1]["test_accuracy"])
    (events,) = tmp_path.glob("events*")
    assert events.stat().st_size > 1000


@pytest.mark.slow
def test_the_transformer_looks_further_back_than_one_character(tmp_path):
    """On words in random order it is better than the best prediction from the last character."""
    words = ["the", "there", "these", "other", "others", "where", "three", "though"]
    text = " ".join(np.random.default_rng(0).choice(words, 4000))
    (tmp_path / "text").write_text(text)
    chosen = config("transformer", num_epochs=6, text_file=str(tmp_path / "text"))
    chosen.model.update(length=24, width=32, blocks=2)
    chosen.learning_rate = 0.01
    history = train.train_and_evaluate(chosen, tmp_path / "run")
    pairs, singles = Counter(pairwise(text)), Counter(text[:-1])
    conditional = -sum(n * np.log(n / singles[a]) for (a, _), n in pairs.items()) / len(text)
    assert history[-1]["test_loss"] < 0.7 * conditional
    drawn = (tmp_path / "run" / "sample.txt").read_text()[30:].split()[1:-1]
    assert np.mean([word in words for word in drawn]) > 0.8


SHRUNK = {
    "linear": dict(dataset="digits"),
    "cnn": dict(dataset="digits"),
    "resnet": dict(dataset="cifar10", batch_size=8),
    "gan": dict(dataset="digits"),
    "diloco": dict(batch_size=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_a_few_steps(tmp_path, name):
    shrunk = config(name, num_epochs=1, log_every=2, **SHRUNK.get(name, {}))
    shrunk.model.update(hidden_sizes=(8,), hidden=8, channels=(4,) * len(shrunk.model.channels))
    shrunk.model.update(length=16, width=4, latent=4)
    if shrunk.task == "language":
        (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 60)
        shrunk.text_file = str(tmp_path / "text")
    if shrunk.dataset == "cifar10":
        write_cifar(tmp_path)
        shrunk.data_dir = str(tmp_path)
    history = train.train_and_evaluate(shrunk, tmp_path)
    assert len(history) >= 2
    if shrunk.task == "language":
        assert len((tmp_path / "sample.txt").read_text()) == 400
    if shrunk.task == "adversarial":
        assert (tmp_path / "generated-001.png").read_bytes().startswith(b"\x89PNG")
    assert all(np.isfinite(value) for row in history for value in row.values())
    assert all(f"test_{key[6:]}" in history[-1] for key in history[-1] if key.startswith("train_"))
    assert (tmp_path / "curves.png").exists()


ITERATE_IS_PARAMS = {"nag_then_sgd", "heavy_ball", "qhm"}
ITERATE_IS_PARAMS |= {"sgd", "momentum", "nesterov", "adam", "adamw", "nadam", "nadamw"}


def one_layer(key):
    """Data of three classes and a task for them, as small as can be."""
    x = jax.random.normal(key, (60, 4, 4, 1))
    data = {"x": np.asarray(x), "y": np.asarray(x[:, 0, :3, 0].argmax(-1), np.int32)}
    dataset = datasets.Dataset(data, data, ("a", "b", "c"))
    return make_task(config("linear"), dataset, key), data


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_updates(name):
    """Each lowers the loss; its evaluation iterate differs from its params if it has one."""
    task, data = one_layer(jax.random.key(0))
    chosen = config(schedule="constant", warmup_epochs=0.0, weight_decay=1e-4, learning_rate=0.01)
    chosen.optimizer.update(name=name, switch_step=15, transition_steps=5)
    tx = make_optimizer(chosen, 10, 80).transformation
    gradients = jax.jit(jax.grad(lambda p: task.losses(p, task.rest, data)[0] / 60))
    params, state = task.params, tx.init(task.params)
    for _ in range(31):  # past the first outer steps of snoo (28) and lookahead (5)
        updates, state = tx.update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
    iterate = nag_jax.eval_params(params, state)
    loss = lambda p: float(task.losses(p, task.rest, data)[0])
    assert loss(iterate) < loss(task.params)
    same = jax.tree.all(jax.tree.map(np.array_equal, iterate, params))
    assert same == (name in ITERATE_IS_PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("averaged", 0.05), ("nag_auto", 0.05), ("ogm", 0.05), ("nadamw", 0.005)],
)
def test_other_optimizers_train(tmp_path, name, learning_rate):
    chosen = config(learning_rate=learning_rate, weight_decay=1e-4)
    chosen.optimizer.name = name
    history = train.train_and_evaluate(chosen, tmp_path)
    assert history[-1]["test_accuracy"] > 75
    same = history[-1]["test_loss"] == history[-1]["test_loss_at_params"]
    assert same == (name in ITERATE_IS_PARAMS)


def test_the_comment_in_the_default_config_lists_the_optimizers():
    text = (ROOT / "configs" / "default.py").read_text()
    comment = re.search(r"ConfigDict\(\)\n((?: *#.*\n)*) *config\.optimizer\.name =", text)[1]
    names = re.sub(r"\([^)]*\)|[#\s]", "", comment).split("|")
    assert sorted(names) == sorted(OPTIMIZERS)


@pytest.mark.slow
def test_the_fields_of_a_config_matter(tmp_path):
    """Each changed alone gives other numbers."""
    changes = [{}, {"seed": 1}, {"momentum": 0.6}, {"weight_decay": 0.1}, {"clip_norm": 0.1}]
    changes += [{"schedule": "constant"}, {"momentum_schedule": "convex"}]
    changes += [{"augment": {"shift": 1}}, {"optimizer": {"convention": "sutskever"}}]
    for change in changes:
        change |= dict(num_epochs=1, warmup_epochs=0.3, model={"hidden_sizes": (8,)})
    losses = set()
    for i, change in enumerate(changes):
        history = train.train_and_evaluate(config(keep_best=False, **change), tmp_path / str(i))
        losses.add(history[-1]["test_loss"])
    assert len(losses) == len(changes)


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path):
    first = train.train_and_evaluate(config(), tmp_path / "a")
    assert train.train_and_evaluate(config(), tmp_path / "b") == first


def test_epochs_see_every_sample_once_in_another_order():
    key = jax.random.key_data(jax.random.key(0))
    orders = [np.asarray(epoch_order(key, epoch, 50)) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "rnn", "transformer"])
def test_accumulated_micro_batches_are_the_large_batch(tmp_path, name):
    small = dict(num_epochs=1, keep_best=False, batch_size=64)
    if name != "mlp":
        (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 120)
        text = str(tmp_path / "text")
        model = dict(length=16, hidden=16) if name == "rnn" else dict(length=16, width=16)
        small |= dict(model=model, text_file=text, eval_batch_size=16)
    whole = train.train_and_evaluate(config(name, **small), tmp_path / "whole")
    parts = train.train_and_evaluate(config(name, accumulate=8, **small), tmp_path / "parts")
    for key in whole[-1]:
        assert parts[-1][key] == pytest.approx(whole[-1][key], rel=1e-5, abs=1e-6)
    ours, theirs = (
        restored(config(name, **small), tmp_path / run)[0] for run in ("parts", "whole")
    )
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=0, atol=1e-6)
    other = train.train_and_evaluate(config(name, **small | dict(batch_size=32)), tmp_path / "o")
    assert abs(other[-1]["test_loss"] - whole[-1]["test_loss"]) > 1e-3


def after_two_updates(name, devices, accumulate):
    """The state, and the compiled update."""
    chosen = config(name, dataset="digits", devices=devices, accumulate=accumulate)
    if name == "resnet":
        chosen.model.channels = (4, 8)
    found = set_up(chosen)
    optimizer = found.optimizer.transformation
    update = jax.jit(make_update(found.task, optimizer, accumulate, found.layout))
    batch = {key: np.asarray(x)[:128] for key, x in found.feed.samples.items()}
    batch = found.layout.put_rows(batch)
    compiled = update.lower(found.state, batch).compile()
    return compiled(compiled(found.state, batch), batch), compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_devices_reduce_once_per_update_and_change_no_number(name):
    """BatchNorm, too, sees the same rows together on any number of devices."""
    alone, _ = after_two_updates(name, 1, 4)
    state, compiled = after_two_updates(name, 8, 4)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, alone)), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=1e-5)
    gradient = 4 * sum(p.size for p in jax.tree.leaves(state.params))
    statistics = 4 * sum(x.size for x in jax.tree.leaves(state.rest))
    # For each micro-batch, of the statistics and their gradients.
    most = gradient + 4 * 2 * statistics + 1000
    assert gradient <= collectives.sent(compiled)["all-reduce"] / (2 * 7 / 8) <= most


def test_evaluation_counts_every_sample_once():
    """Sizes that do not divide: 7 batches of 3 over 20 samples, the last one padded."""

    class Known:
        def evaluate(self, params, rest, batch):
            return {"samples": batch["weight"].sum(), "x": (batch["weight"] * batch["x"]).sum()}

    split = {"x": np.arange(20, dtype=np.float32)}
    sums = make_evaluate(Known(), 3)(None, None, jax.device_put(split))
    assert (float(sums["samples"]), float(sums["x"])) == (20, 190)


@pytest.mark.slow
def test_the_test_metrics_are_those_of_the_evaluation_iterate(tmp_path):
    """Recomputed from the checkpoint, without the trainer."""
    chosen = config(num_epochs=1)
    row = train.train_and_evaluate(chosen, tmp_path)[-1]
    state, dataset, _ = restored(chosen, tmp_path)

    def accuracy(params):
        x = (dataset.test["x"].reshape(360, -1) - dataset.mean) / dataset.std
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        for i, (bias, kernel) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
            x = x @ kernel + bias
            x = np.maximum(x, 0) if i < 2 else x
        return 100 * np.mean(x.argmax(-1) == dataset.test["y"]), x

    at_x, logits = accuracy(nag_jax.eval_params(state.params, state.opt_state))
    assert row["test_accuracy"] == pytest.approx(at_x)
    assert row["test_accuracy_at_params"] == pytest.approx(accuracy(state.params)[0])
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(360), dataset.test["y"]]
    assert row["test_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def restored(config, workdir):
    dataset = datasets.load(config)
    task = make_task(config, dataset, jax.random.key(0))
    steps_per_epoch = len(dataset.train["x"]) // config.batch_size
    maker = make_optimizer(config, steps_per_epoch, config.num_epochs * steps_per_epoch)
    template = initial_state(
        task, maker.transformation, jax.random.key(0), jax.device_put(dataset.train)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", 3)
    state = checkpoints.restore_newest(template).state
    checkpoints.close()
    return state, dataset, task


@pytest.mark.slow
def test_batch_statistics_belong_to_the_evaluation_iterate(tmp_path):
    """After the refresh a BatchNorm layer standardizes its input at that iterate."""
    chosen = config("resnet", dataset="digits", num_epochs=1, augment={"flip": False, "shift": 0})
    chosen.model.channels = (4, 8)
    train.train_and_evaluate(chosen, tmp_path)
    state, dataset, task = restored(chosen, tmp_path)
    params = jax.tree.map(lambda p: 1.5 * p, nag_jax.eval_params(state.params, state.opt_state))
    rest = make_refresh(task, 128)(params, jax.device_put(dataset.train))
    model = task.model(params, rest, train=False)
    x = (dataset.train["x"][:1408].astype(np.float32) - dataset.mean) / dataset.std
    stem = np.asarray(model.stem(x))
    np.testing.assert_allclose(model.norm.mean[...], stem.mean((0, 1, 2)), rtol=0.15, atol=0.05)
    within = np.mean([part.var((0, 1, 2)) for part in np.split(stem, 11)], axis=0)
    np.testing.assert_allclose(model.norm.var[...], within, rtol=0.15)
    old = task.model(params, state.rest, train=False).norm.var[...]
    assert np.max(np.abs(old / within - 1)) > 0.3


@pytest.mark.slow
def test_shards_are_streamed_and_their_bad_records_counted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((6, 3))
    for name, rows in (("train", 900), ("test", 200)):
        x = rng.standard_normal((rows, 6)).astype(np.float32)
        y = (x @ teacher).argmax(1).astype(np.int32)
        x[7] = np.nan
        write_shards(tmp_path / "data" / name, [(x, y)], 250, 3)
    chosen = config(dataset="shards", data_dir=str(tmp_path / "data"), num_epochs=8)
    chosen.update(batch_size=50, eval_batch_size=64, log_every=5, on_bad="skip")
    history = train.train_and_evaluate(chosen, tmp_path / "run")
    assert history[-1]["test_accuracy"] > 85
    assert history[-1]["bad_records"] == 1
    assert history[-1]["step"] == 8 * 18
    assert "test: 1 bad records" in capsys.readouterr().out
    chosen.on_bad = "refuse"
    with pytest.raises(UserError, match=r"train/x-00000\.npy: row 7"):
        train.train_and_evaluate(chosen, tmp_path / "other")
    write_shards(tmp_path / "good" / "train", [(np.nan_to_num(x), y)], 250, 3)
    write_shards(tmp_path / "good" / "test", [(x, y)], 250, 3)
    chosen.data_dir = str(tmp_path / "good")
    with pytest.raises(UserError, match=r"test/x-00000\.npy: row 7"):
        train.train_and_evaluate(chosen, tmp_path / "other")
    chosen.on_bad = "skip"
    write_shards(tmp_path / "bad" / "train", [(np.full_like(x, np.nan), y)], 250, 3)
    write_shards(tmp_path / "bad" / "test", [(x, y)], 250, 3)
    chosen.data_dir = str(tmp_path / "bad")
    with pytest.raises(UserError, match="bad/train: all of the first 200 rows are bad"):
        train.train_and_evaluate(chosen, tmp_path / "other")


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    first = train.train_and_evaluate(config(), tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert train.train_and_evaluate(config(), tmp_path) == first
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out
    message = r"a run with another config: there config\.learning_rate is 0\.05, here 0\.01"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config(learning_rate=0.01), tmp_path)
    assert rows_of(tmp_path) == first


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def write_small_shards(folder):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        x = rng.integers(0, 256, (80, 6, 5, 1), np.uint8)
        write_shards(folder / name, [(x, np.arange(80) % 3)], 30, 3)


def write_text(folder):
    (folder / "text").write_text("to be, or not to be: that is the question. " * 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "write", "changed"),
    [
        ("mnist", write_dataset, "train-images-idx3-ubyte"),
        ("mnist", write_dataset, "t10k-images-idx3-ubyte"),
        ("shards", write_small_shards, "train/x-00002.npy"),
        ("shards", write_small_shards, "test/x-00000.npy"),
        ("text", write_text, "text"),
    ],
)
def test_a_run_resumes_only_with_its_own_data(tmp_path, capsys, dataset, write, changed):
    """Also after they were moved; other data are refused even if one bit differs."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    chosen = config("rnn" if dataset == "text" else "mlp", dataset=dataset, batch_size=4)
    chosen.model.update(hidden_sizes=(4,), hidden=4, length=16)
    chosen.num_epochs, chosen.data_dir = 1, str(tmp_path / "data")
    chosen.text_file = str(tmp_path / "data" / "text") if dataset == "text" else ""
    train.train_and_evaluate(chosen, tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    chosen.data_dir = chosen.data_dir.replace("/data", "/moved")
    chosen.text_file = chosen.text_file.replace("/data", "/moved")
    train.train_and_evaluate(chosen, tmp_path / "run")
    assert "already finished" in capsys.readouterr().out
    before = rows_of(tmp_path / "run")
    flip_a_bit(tmp_path / "moved" / changed)
    for _ in ("finished", "interrupted"):
        message = rf"holds a run on other data than config\.dataset={dataset} in .*moved.* has now"
        with pytest.raises(UserError, match=message):
            train.train_and_evaluate(chosen, tmp_path / "run")
        (tmp_path / "run" / "curves.png").unlink(missing_ok=True)
    assert rows_of(tmp_path / "run") == before


def test_a_run_of_a_version_that_did_not_know_its_data(tmp_path, monkeypatch):
    save = Checkpoints.save

    def without(self, step, state, meta):
        save(self, step, state, {k: v for k, v in meta.items() if k != "fingerprint"})

    monkeypatch.setattr(Checkpoints, "save", without)
    chosen = config(num_epochs=1)
    train.train_and_evaluate(chosen, tmp_path)
    with pytest.raises(UserError, match=r"of an older version, .*; choose another --workdir"):
        train.train_and_evaluate(chosen, tmp_path)


@pytest.mark.slow
def test_a_run_that_failed_early_may_be_corrected(tmp_path):
    with pytest.raises(UserError, match=r"not finite in .* below 10000"):
        train.train_and_evaluate(config(learning_rate=1e4), tmp_path)
    assert train.train_and_evaluate(config(), tmp_path)[-1]["test_accuracy"] > 85


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped(tmp_path):
    skipping = config(learning_rate=1e4, nonfinite="skip", keep_best=False)
    train.train_and_evaluate(skipping, tmp_path)
    state, _, _ = restored(skipping, tmp_path)
    assert int(state.skipped) > 0
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"config\.batch_size must be at least 1, got 0"),
        ({"batch_size": 4096}, r"config\.batch_size=4096 is more than the 1437 training samples"),
        (
            {"batch_size": 100, "devices": 8},
            r"cannot be split evenly over 8 devices .* a multiple of 8",
        ),
        ({"accumulate": 3}, r"with config\.accumulate=3; make it a multiple of 3"),
        ({"devices": 9}, r"config\.devices must be in \[0, 8\], got 9"),
        ({"num_epochs": -1}, r"config\.num_epochs must be at least 1"),
        ({"warmup_epochs": float("inf")}, r"config\.warmup_epochs must be at least 0, got inf"),
        ({"seed": -1}, r"config\.seed must be in"),
        ({"momentum": 1.0}, r"config: momentum must be in \[0, 1\), got 1"),
        ({"learning_rate": -0.1}, r"config: learning_rate must be in \[0, inf\), got -0.1"),
        ({"weight_decay": -0.1}, r"config: weight_decay must be in \[0, inf\), got -0.1"),
        ({"decay": "l1"}, "config: decay must be one of 'coupled', 'decoupled', got 'l1'"),
        ({"schedule": "step"}, r"config\.schedule must be one of constant, cosine, got 'step'"),
        ({"momentum_schedule": "x"}, r"config\.momentum_schedule must be one of constant"),
        ({"model": {"name": "mpl"}}, r"config\.model\.name must be one of linear, mlp"),
        ({"model": {"name": "gru"}}, r"config\.model\.name must be one of linear, mlp"),
        ({"model": {"hidden_sizes": (0,)}}, r"config\.model\.hidden_sizes must be positive"),
        ({"optimizer": {"name": "sgdm"}}, r"config\.optimizer\.name must be one of nag, "),
        ({"task": "regresion"}, r"config\.task must be one of classification"),
        ({"nonfinite": "go on"}, r"config\.nonfinite must be one of"),
        ({"augment": {"zoom": 1.5}}, r"config\.augment needs"),
        ({"optimizer": {"name": "adam", "b2": 1.0}}, r"config\.optimizer\.b2 must be in \[0, 1\)"),
        (
            {"optimizer": {"name": "adam"}, "momentum_schedule": "convex"},
            r"name=adam cannot schedule its momentum: .* use one of nag, averaged",
        ),
        (
            {"model": {"name": "cnn", "channels": (4, 4, 4)}},
            r"config\.model\.channels must be two for cnn",
        ),
        (
            {"dataset": "diabetes"},
            r"classification needs .*=diabetes has rows of numbers with targets",
        ),
        (
            {"task": "language", "dataset": "text"},
            r"model\.name='mlp' cannot do text: use gru or transformer",
        ),
        (
            {"model": {"name": "transformer", "width": 30}},
            r"model\.width must be a multiple of config\.model\.heads=4, got 30",
        ),
        ({"task": "language"}, r"language needs text, config\.dataset=digits has images"),
        ({"task": "regression"}, r"regression needs rows of numbers with targets"),
        ({"task": "adversarial", "dataset": "text"}, r"adversarial needs images .*=text has text"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "write"), [("mnist", write_dataset), ("shards", write_small_shards)]
)
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, dataset, write):
    """In ``--workdir=~/run`` the shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    write_text(tmp_path)
    chosen = config(dataset=dataset, batch_size=4, data_dir="~/data", num_epochs=1)
    chosen.model.hidden_sizes = (4,)
    train.train_and_evaluate(chosen, "~/run")
    assert (tmp_path / "run" / "curves.png").exists()
    assert datasets.load(config("rnn", text_file="~/text")).train["x"].shape[1] == 65
    with pytest.raises(UserError, match=r"~nobody-here/run: no such home folder"):
        train.train_and_evaluate(chosen, "~nobody-here/run")


def test_shards_without_a_folder(tmp_path):
    message = r"config\.dataset=shards needs --config\.data_dir=FOLDER, with FOLDER/train and"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config(dataset="shards"), tmp_path)
