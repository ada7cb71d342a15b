"""Settings without effect are refused, those with one are not, and the table of both is true."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.trainer import optimizer
from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.options import command_line, effects
from examples.trainer.options.fields import differing, flatten
from examples.trainer.run import saving
from examples.trainer.tasks import tasks
from trainer.helpers import OPTIMIZERS, RECIPES, ROOT, change, config

PROGRAMS = {"train": "examples.trainer", "diloco": "examples.trainer.diloco"}


def refuse(program, name, **changes):
    """As if these were given on the command line; ``__`` stands for a dot."""
    chosen = import_module(f"configs.{name}").get_config()
    file = flatten(chosen.to_dict())
    for field, value in changes.items():
        change(chosen, field.replace("__", "."), value)
    given = flatten(chosen.to_dict())
    effects.refuse(differing(given, file), given, PROGRAMS[program])


@pytest.mark.parametrize(
    ("program", "name", "changes", "message"),
    [
        (
            "train", "mlp", dict(optimizer__name="sgd", momentum=0.95),
            r"config\.momentum=0\.95 has no effect with config\.optimizer\.name=sgd, which has "
            r"no momentum to set; leave it out, or change config\.optimizer\.name",
        ),
        ("train", "mlp", dict(momentum_schedule="convex", momentum=0.8), r"schedule=convex, which"),
        ("train", "mlp", dict(optimizer__name="nag_auto", learning_rate=0.1), "finds its own"),
        ("train", "mlp", dict(optimizer__name="nag_auto", schedule="constant"), "no schedule of"),
        ("train", "mlp", dict(optimizer__name="nag_then_sgd", warmup_epochs=2.0), "warmup_epochs"),
        ("train", "mlp", dict(optimizer__name="adam", optimizer__convention="sutskever"), "nag or"),
        ("train", "mlp", dict(optimizer__switch_step=5), "set config.optimizer.name to nag_then_s"),
        ("train", "mlp", dict(optimizer__b2=0.99), "to adam or adamw or nadam or nadamw$"),
        ("train", "linear", dict(decay="decoupled"), r"with config\.weight_decay=0\.0; leave it"),
        ("train", "rnn", dict(augment__shift=1), r"task=language; .* set config\.task to classif"),
        ("train", "cnn", dict(model__hidden_sizes=(5,)), "set config.model.name to mlp"),
        ("train", "mlp", dict(data_dir="/data"), "config.data_dir=/data has no effect with config"),
        ("train", "mlp", dict(text_file="/text"), "set config.dataset to text"),
        ("train", "mlp", dict(on_bad="skip"), "set config.dataset to shards"),
        ("train", "mlp", dict(dataset="shards", scan=False), "scan=False has no .* change config"),
        ("train", "mlp", dict(plateau__factor=0.5), "change config.plateau.patience"),
        ("train", "mlp", dict(stop__min_change=0.5), "change config.stop.patience"),
        ("train", "mlp", dict(sweep__high=1.0, sweep__low=0.1), "have no .* set config.find_lr to"),
        ("train", "mlp", dict(find_lr=True, learning_rate=0.1), "which makes config.sweep.steps"),
        ("train", "mlp", dict(find_lr=True, warmup_epochs=0.0), "warmup_epochs=0.0 has no effect"),
        ("train", "diloco", dict(local__every=(4,)), "in examples.trainer; .* run examples.t"),
        ("diloco", "diloco", dict(find_lr=True), "in examples.trainer.d.* or run examples.t"),
        ("diloco", "diloco", dict(augment__flip=True), r"config\.augment\.flip=True has no effect"),
        ("diloco", "diloco", dict(accumulate=2, stop__patience=2), "accumulate=2, .* have no eff"),
        ("diloco", "diloco", dict(optimizer__name="nag_auto", local__learning_rate=0.1), "finds"),
    ],
)  # fmt: skip
def test_settings_without_effect(program, name, changes, message):
    with pytest.raises(UserError, match=message):
        refuse(program, name, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in RECIPES),
        ("mlp", dict(optimizer__name="adam", learning_rate=0.001, momentum=0.8)),
        ("mlp", dict(optimizer__name="nag_auto", momentum=0.8)),
        ("mlp", dict(optimizer__name="nag_auto", momentum_schedule="linear", warmup_epochs=2.0)),
        ("mlp", dict(optimizer__name="nag_then_sgd", learning_rate=0.1, decay="decoupled")),
        ("mlp", dict(find_lr=True, sweep__high=1.0, momentum=0.8, accumulate=2, devices=1)),
        ("cnn", dict(augment__flip=False, augment__shift=0, augment__zoom=0.0)),
        ("resnet", dict(dataset="cifar10", data_dir="/data", model__blocks=3)),
        ("mlp", dict(plateau__patience=3, plateau__factor=0.5, stop__target=90.0)),
        ("mlp", dict(dataset="shards", data_dir="/data", on_bad="skip")),
    ],
)  # fmt: skip
def test_settings_with_effect(name, changes):
    refuse("train", name, **changes)


COMMANDS = [
    (page.name, *match)
    for page in (
        ROOT / "README.md",
        ROOT / "benchmarks" / "README.md",
        ROOT / "docs" / "tutorial.md",
    )
    for match in re.findall(r"--config=configs/(\w+)\.py([^`\n]*)", page.read_text())
]


@pytest.mark.parametrize(("page", "name", "options"), COMMANDS)
def test_the_commands_of_the_pages_are_accepted(page, name, options):
    fields = re.findall(r"--config\.([\w.]+)=(\S+)", options)
    changes = {field.replace(".", "__"): value_of(text) for field, text in fields}
    refuse("diloco" if name == "diloco" else "train", name, **changes)


def value_of(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def test_the_recipe_of_diloco_is_accepted():
    refuse("diloco", "diloco")
    refuse(
        "trainer.diloco", "diloco", local__every=(4,), num_epochs=2, text_file="/text", momentum=0.5
    )


OTHERS = {
    "learning_rate": 0.02,
    "momentum": 0.6,
    "schedule": "constant",
    "warmup_epochs": 1.0,
    "weight_decay": 0.2,
    "decay": "decoupled",
    "clip_norm": 0.5,
    "optimizer.convention": "sutskever",
    "optimizer.switch_step": 2,
    "optimizer.transition_steps": 1,
    "optimizer.b2": 0.9,
}


def params_after(chosen, updates=4):
    maker = optimizer.make(chosen, 2, 8)
    params = {"w": jnp.array([[1.0, 2.0]])}
    state = maker.transformation.init(params)
    for step in range(updates):
        gradients = {"w": params["w"] * jnp.array([[1.0, 3.0]]) - 1.5 * step}
        updates, state = maker.transformation.update(gradients, state, params)
        params = {"w": params["w"] + updates["w"]}
    return np.asarray(params["w"])


@pytest.mark.parametrize("momentum_schedule", ["constant", "linear", "convex"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_is_true_of_every_optimizer(name, momentum_schedule):
    """A field changes the updates if and only if the table does not say that it is ignored."""
    chosen = config(weight_decay=0.1, warmup_epochs=0.5, momentum_schedule=momentum_schedule)
    chosen.optimizer.update(name=name, switch_step=3, transition_steps=2)
    try:
        expected = params_after(chosen)
    except UserError as error:
        assert "has no schedule of momentum" in str(error)  # noqa: PT017
        return
    for field, value in OTHERS.items():
        other = chosen.copy_and_resolve_references()
        change(other, field, value)
        same = np.array_equal(params_after(other), expected)
        assert same == bool(effects.ignored([field], flatten(other.to_dict()))), field


def test_every_field_of_the_table_exists():
    fields = flatten(import_module("configs.diloco").get_config().to_dict())
    for rule in effects._TABLE:
        assert {*rule.fields.split(), rule.other} <= fields.keys()
    for unused, _ in effects._UNUSED.values():
        assert all(name in fields or f"{name}." in " ".join(fields) for name in unused.split())


def run(program, *options):
    return subprocess.run(
        [sys.executable, "-m", PROGRAMS[program], *options],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


OWN = """
from configs import {base}

def get_config():
    config = {base}.get_config()
    config.optimizer.name = "nag_auto"
    {more}
    return config
"""


def test_on_the_command_line(tmp_path):
    options = ["--config=configs/mlp.py", "--config.optimizer.name=sgd", "--config.momentum=0.8"]
    result = run("train", *options, f"--workdir={tmp_path / 'run'}")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert (
        "error: config.momentum=0.8 has no effect with config.optimizer.name=sgd" in result.stderr
    )
    assert not (tmp_path / "run").exists()
    result = run("diloco", "--config=configs/diloco.py", "--config.find_lr=True")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "config.find_lr=True has no effect in examples.trainer.diloco" in result.stderr


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("base", "more", "options", "refused"),
    [
        ("default", "config.learning_rate = 0.3", [], True),
        ("default", "config.learning_rate = 0.3", ["--config.optimizer.name=nag"], False),
        ("default", "config.optimizer.name = 'nag'; config.learning_rate = 0.3",
         ["--config.optimizer.name=nag_auto"], False),
        ("rnn", "config.batch_size = 16", [], False),
        ("linear", "config.dataset = 'digits'; config.model.name = 'mlp'; config.num_epochs = 2",
         [], False),
        ("linear", "config.model.name = 'mlp'; config.learning_rate = 0.3", [], True),
    ],
)  # fmt: skip
def test_a_config_file_of_the_users_own(tmp_path, monkeypatch, base, more, options, refused):
    """It is held against the recipe that it is made of; the command line may mend it."""
    give(tmp_path, monkeypatch, OWN.format(base=base, more=more), options)
    if not refused:
        command_line.refuse_without_effect("examples.trainer")
        return
    with pytest.raises(UserError, match=r"config\.learning_rate=0\.3 has no effect with"):
        command_line.refuse_without_effect("examples.trainer")


def give(folder, monkeypatch, content, options=()):
    """Parses a config file with this content and options, as if they came from the command line."""
    path = folder / "own.py"
    path.write_text(content)
    values = command_line.flags.FlagValues()
    arguments = ["train", f"--config={path}", *options]
    config_flags = pytest.importorskip("ml_collections").config_flags
    monkeypatch.setattr(sys, "argv", arguments)
    config_flags.DEFINE_config_file("config", None, "", values)
    values(arguments)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learnin_rate = 0.3", r"no field config\.learnin_rate; did you mean config\.learning_rat"),
        ("model.layers = 3", r"no field config\.model\.layers; "),
        (
            "zzz = 3",
            r"own\.py: there is no field config\.zzz; configs/default\.py lists all fields",
        ),
        ("keep = 1; del config.keep", r"its config has no field keep; begin with that of configs/"),
    ],
)
def test_a_config_file_with_other_fields(tmp_path, monkeypatch, line, message):
    give(tmp_path, monkeypatch, OWN.format(base="mlp", more=f"config.{line}"))
    with pytest.raises(UserError, match=message):
        command_line.refuse_without_effect("examples.trainer")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_config_file_that_returns_no_config(tmp_path, monkeypatch):
    give(tmp_path, monkeypatch, "def get_config():\n    return {'seed': 0}")
    with pytest.raises(UserError, match=r"own\.py: get_config\(\) must return a ConfigDict$"):
        command_line.refuse_without_effect("examples.trainer")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_files_of_users_beside_the_recipes(tmp_path, monkeypatch):
    """They are told of their mistakes like others, and do not keep another from running."""
    assert {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")} == set(
        command_line._RECIPES
    )
    folder = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", folder)
    monkeypatch.setattr(command_line, "_SHIPPED", folder)
    (folder / "unfinished.py").write_text("def get_config(")
    (folder / "rnn.py").write_text("def get_config(")
    give(folder, monkeypatch, OWN.format(base="mlp", more=""))
    command_line.refuse_without_effect("examples.trainer")
    give(folder, monkeypatch, OWN.format(base="mlp", more="config.learning_rate = 0.3"))
    with pytest.raises(UserError, match=r"config\.learning_rate=0\.3 has no effect with"):
        command_line.refuse_without_effect("examples.trainer")
    give(folder, monkeypatch, OWN.format(base="mlp", more="config.learnin_rate = 0.3"))
    with pytest.raises(UserError, match=r"no field config\.learnin_rate; did you mean"):
        command_line.refuse_without_effect("examples.trainer")
    (folder / "mlp.py").write_text((folder / "own.py").read_text())  # a recipe that was edited
    with pytest.raises(UserError, match=r"no field config\.learnin_rate; did you mean"):
        command_line.refuse_without_effect("examples.trainer")


def test_advice_has_an_effect():
    chosen = config()
    assert saving.remedies(chosen).startswith("a learning rate below 0.05, --config.clip_norm=1,")
    chosen.clip_norm = 1.0
    chosen.optimizer.name = "nag_auto"
    assert saving.remedies(chosen) == "--config.clip_norm=0.1, or --config.nonfinite=skip"


def test_augmentation_of_rows_of_numbers_is_refused():
    rows = dict(x=np.zeros((4, 3), np.float32), y=np.zeros(4, np.int32))
    chosen = config(dataset="shards")
    make = lambda: tasks.make(chosen, Dataset(rows, rows, ("0", "1")), jax.random.key(0))
    make()
    chosen.augment.shift = 1
    message = r"config\.augment is for images, config\.dataset=shards has rows of numbers"
    with pytest.raises(UserError, match=message):
        make()
