"""Settings without effect are refused, those with one are not, and the table of both is true."""

import ast
import re
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.trainer.data.datasets import Dataset
from examples.trainer.errors import UserError
from examples.trainer.optimizer import make_optimizer
from examples.trainer.options import effects
from examples.trainer.options.fields import differing, flatten
from examples.trainer.run.saving import remedies
from examples.trainer.tasks.choose import make_task
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
            r"no momentum to set; remove it, or change config\.optimizer\.name",
        ),
        ("train", "mlp", dict(momentum_schedule="convex", momentum=0.8), r"schedule=convex, which"),
        ("train", "mlp", dict(optimizer__name="nag_auto", learning_rate=0.1), "finds its own"),
        ("train", "mlp", dict(optimizer__name="nag_auto", schedule="constant"), "no schedule of"),
        ("train", "mlp", dict(optimizer__name="nag_then_sgd", warmup_epochs=2.0), "warmup_epochs"),
        ("train", "mlp", dict(optimizer__name="adam", optimizer__convention="sutskever"), "nag or"),
        ("train", "mlp", dict(optimizer__switch_step=5), "set config.optimizer.name to nag_then_s"),
        ("train", "mlp", dict(optimizer__b2=0.99), "to adam or adamw or ema_nesterov or na"),
        ("train", "linear", dict(decay="decoupled"), r"with config\.weight_decay=0\.0; remove it"),
        ("train", "rnn", dict(augment__shift=1), r"task=language; .* set config\.task to classif"),
        ("train", "rnn", dict(model__heads=2), "set config.model.name to transformer"),
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
        ROOT / "examples" / "trainer" / "README.md",
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
    refuse("diloco", "diloco", local__every=(4,), num_epochs=2, text_file="/text", momentum=0.5)


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


@jax.disable_jit()  # otherwise each optimizer compiles its own branches
def params_after(chosen, updates=4):
    maker = make_optimizer(chosen, 2, 8)
    params = {"w": jnp.array([[1.0, 2.0]])}
    state = maker.transformation.init(params)
    for step in range(updates):
        gradients = {"w": params["w"] * jnp.array([[1.0, 3.0]]) - 1.5 * step}
        updates, state = maker.transformation.update(gradients, state, params)
        params = {"w": params["w"] + updates["w"]}
    return np.asarray(params["w"])


@pytest.mark.slow
@pytest.mark.parametrize("momentum_schedule", ["constant", "linear", "convex"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_is_true_of_every_optimizer(name, momentum_schedule):
    """A field changes the updates if and only if the table does not say that it is ignored."""
    chosen = config(weight_decay=0.1, warmup_epochs=0.5, momentum_schedule=momentum_schedule)
    chosen.optimizer.update(name=name, switch_step=3, transition_steps=2)
    try:
        expected = params_after(chosen)
    except UserError as error:
        assert "cannot schedule its momentum" in str(error)  # noqa: PT017
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


def test_advice_has_an_effect():
    chosen = config()
    assert remedies(chosen).startswith("a learning rate below 0.05, --config.clip_norm=1,")
    chosen.clip_norm = 1.0
    chosen.optimizer.name = "nag_auto"
    assert remedies(chosen) == "--config.clip_norm=0.1, or --config.nonfinite=skip"


def test_augmentation_of_rows_of_numbers_is_refused():
    rows = dict(x=np.zeros((4, 3), np.float32), y=np.zeros(4, np.int32))
    chosen = config(dataset="shards")
    make = lambda: make_task(chosen, Dataset(rows, rows, ("0", "1")), jax.random.key(0))
    make()
    chosen.augment.shift = 1
    message = r"config\.augment is for images, config\.dataset=shards has rows of numbers"
    with pytest.raises(UserError, match=message):
        make()
