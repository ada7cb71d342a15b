"""Refuses settings without effect; otherwise a run could be mistaken for one that used them.

The table states for each field of a config with which values of another field it has no effect.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from examples.trainer.errors import UserError
from examples.trainer.optimizer import OPTIMIZERS

Flat = dict[str, Any]  # a config as fields.flatten gives it


class Rule(NamedTuple):
    """``fields``, separated by spaces, have no effect with these values of ``other``."""

    fields: str
    other: str
    ignored: Callable[[Any], bool]  # of the value of other
    instead: str
    because: str = ""
    unless: tuple[str, Any] = ("", None)  # a third field, and the value with which they matter

    def ignores(self, field: str, config: Flat) -> bool:
        """Whether ``field`` has no effect in this config."""
        third, value = self.unless
        needed = third in config and config[third] == value
        known = field in self.fields.split() and self.other in config
        return known and self.ignored(config[self.other]) and not needed


def _only(fields: str, other: str, *values: Any, because: str = "") -> Rule:
    """The fields have an effect only with these values."""
    instead = f"set config.{other} to {' or '.join(str(value) for value in values)}"
    return Rule(fields, other, lambda value: value not in values, instead, because)


def _never(fields: str, other: str, *values: Any, **more: Any) -> Rule:
    """The fields have no effect with these values."""
    return Rule(fields, other, lambda value: value in values, f"change config.{other}", **more)


_NAG = ("nag", "averaged", "lookahead", "snoo")
_NO_MOMENTUM = sorted(name for name, o in OPTIMIZERS.items() if o.momentum == "none")
_OWN_RATE = sorted(name for name, o in OPTIMIZERS.items() if o.learning_rate == "found")
_UNSCHEDULED = sorted(name for name, o in OPTIMIZERS.items() if o.learning_rate != "scheduled")
_NO_SCHEDULE = "which uses no schedule of the learning rate"
_SWEEP = "which makes config.sweep.steps updates at the rates of config.sweep and keeps nothing"
_SWEEPS_IGNORE = (
    "learning_rate schedule num_epochs plateau.patience plateau.factor plateau.min_change "
    "stop.patience stop.min_change stop.target nonfinite scan eval_batch_size log_every "
    "eval_every checkpoint_every keep keep_best tensorboard"
)
_TABLE = (
    _only("data_dir", "dataset", "fashion_mnist", "mnist", "cifar10", "shards"),
    _only("text_file model.length", "dataset", "text"),
    _only("on_bad", "dataset", "shards"),
    _never("scan", "dataset", "shards"),
    _only("augment.flip augment.shift augment.zoom", "task", "classification"),
    _only("model.hidden_sizes", "model.name", "mlp"),
    _only("model.channels", "model.name", "cnn", "resnet"),
    _only("model.hidden", "model.name", "cnn", "gru"),
    _only("model.blocks", "model.name", "resnet", "transformer"),
    _only("model.embedding", "model.name", "gru"),
    _only("model.latent", "model.name", "dcgan"),
    _only("model.width", "model.name", "dcgan", "transformer"),
    _only("model.heads", "model.name", "transformer"),
    _only("optimizer.convention", "optimizer.name", *_NAG),
    _only("optimizer.switch_step optimizer.transition_steps", "optimizer.name", "nag_then_sgd"),
    _only("optimizer.b2", "optimizer.name", "adam", "adamw", "ema_nesterov", "nadam", "nadamw"),
    _never(
        "learning_rate local.learning_rate", "optimizer.name", *_OWN_RATE,
        because="which finds its own",
    ),
    _never("schedule", "optimizer.name", *_UNSCHEDULED, because=_NO_SCHEDULE),
    _never(
        "warmup_epochs", "optimizer.name", *_UNSCHEDULED,
        because=_NO_SCHEDULE, unless=("momentum_schedule", "linear"),
    ),
    _never(
        "momentum", "optimizer.name", *_NO_MOMENTUM,
        because="which has no momentum to set",
    ),
    _never("momentum", "momentum_schedule", "convex", because="which tends to 1"),
    _only("decay", "optimizer.name", *_NAG, "nag_then_sgd"),
    _never("decay", "weight_decay", 0),
    _never("plateau.factor plateau.min_change", "plateau.patience", 0),
    _never("stop.min_change", "stop.patience", 0),
    _only("sweep.low sweep.high sweep.steps", "find_lr", True),
    _only(_SWEEPS_IGNORE, "find_lr", False, because=_SWEEP),
    _never(
        "warmup_epochs", "find_lr", True, because=_SWEEP, unless=("momentum_schedule", "linear")
    ),
)  # fmt: skip

# Fields and groups that a program ignores, and the program that uses them.
_UNUSED = {
    "examples.trainer": ("local", "examples.trainer.diloco"),
    "examples.trainer.diloco": (
        "accumulate augment devices on_bad scan plateau stop nonfinite find_lr sweep log_every "
        "eval_every checkpoint_every keep keep_best tensorboard",
        "examples.trainer",
    ),
}


def refuse(given: Iterable[str], config: Flat, program: str) -> None:
    """UserError if one of the fields ``given`` to ``program`` has no effect in ``config``."""
    unused, other = _UNUSED[program]
    foreign = [name for name in given if {name, name.partition(".")[0]} & set(unused.split())]
    if foreign:
        raise UserError(_message(foreign, config, f"in {program}", f"run {other}"))
    if found := ignored(given, config):
        raise UserError(found)


def ignored(given: Iterable[str], config: Flat) -> str:
    """Which fields have no effect, why, and what to do; empty if all have one."""
    given = list(given)
    for rule in _TABLE:
        if names := [name for name in given if rule.ignores(name, config)]:
            because = f", {rule.because}" if rule.because else ""
            why = f"with {_set(rule.other, config)}{because}"
            return _message(names, config, why, rule.instead)
    return ""


def _message(names: list[str], config: Flat, why: str, instead: str) -> str:
    settings = ", ".join(_set(name, config) for name in names)
    verb, them = ("has", "it") if len(names) == 1 else ("have", "them")
    return f"{settings} {verb} no effect {why}; remove {them}, or {instead}"


def _set(name: str, config: Flat) -> str:
    return f"config.{name}={config[name]}"
