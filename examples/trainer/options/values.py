"""Checks the values of a config before anything is read or written."""

from typing import Any

from examples.trainer.cluster.layout import device_count
from examples.trainer.compiling import FUSIONS
from examples.trainer.errors import UserError


def check_config(config: Any) -> None:
    """UserError for a value that no run can use, or that these devices cannot use."""
    check_values(config)
    check_devices(config)


def check_values(config: Any) -> None:
    """UserError for a value that no run can use."""
    at_least = dict.fromkeys(("batch_size", "eval_batch_size", "num_epochs", "accumulate"), 1)
    at_least |= dict.fromkeys(("eval_every", "keep"), 1)
    at_least |= dict.fromkeys(("warmup_epochs", "clip_norm", "log_every", "checkpoint_every"), 0)
    for name, low in at_least.items():
        if not low <= config[name] < 2**31:
            raise UserError(f"config.{name} must be at least {low}, got {config[name]}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed must be in [0, 2**32), got {config.seed}")
    for name in ("hidden_sizes", "channels"):
        if not all(isinstance(n, int) and n > 0 for n in config.model[name]):
            raise UserError(f"config.model.{name} must be positive ints, got {config.model[name]}")
    stages = len(config.model.channels)
    if stages == 0 or (config.model.name == "cnn" and stages != 2):
        need = "two for cnn, one for each stage of resnet"
        raise UserError(f"config.model.channels must be {need}, got {config.model.channels}")
    for name in ("hidden", "blocks", "embedding", "length", "latent", "width", "heads"):
        if config.model[name] < 1:
            raise UserError(f"config.model.{name} must be at least 1, got {config.model[name]}")
    if config.model.name == "transformer" and config.model.width % config.model.heads:
        raise UserError(
            f"config.model.width must be a multiple of config.model.heads={config.model.heads}, "
            f"got {config.model.width}"
        )
    if not set(config.cpu_fusions) <= set(FUSIONS):
        raise UserError(f"config.cpu_fusions must be some of {FUSIONS}, got {config.cpu_fusions}")
    if not (config.augment.shift >= 0 and 0 <= config.augment.zoom < 1):
        raise UserError("config.augment needs shift >= 0 and zoom in [0, 1)")
    for group in ("plateau", "stop"):
        for name in ("patience", "min_change"):
            if not 0 <= config[group][name] < 2**31:
                raise UserError(
                    f"config.{group}.{name} must be at least 0, got {config[group][name]}"
                )
    if not 0 < config.plateau.factor < 1:
        raise UserError(f"config.plateau.factor must be in (0, 1), got {config.plateau.factor}")
    if not (0 < config.sweep.low < config.sweep.high < float("inf") and config.sweep.steps > 1):
        raise UserError("config.sweep needs 0 < low < high and at least 2 steps")
    for name, choices in (("nonfinite", ("stop", "skip")), ("on_bad", ("refuse", "skip"))):
        if config[name] not in choices:
            raise UserError(f"config.{name} must be one of {choices}, got {config[name]!r}")


def check_devices(config: Any) -> None:
    """UserError if there are no such devices, or if they cannot share a batch evenly."""
    available = device_count()
    if not 0 <= config.devices <= available:
        raise UserError(f"config.devices must be in [0, {available}], got {config.devices}")
    devices, parts = config.devices or available, config.accumulate
    if config.batch_size % (devices * parts):
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be split evenly over {devices} devices "
            f"with config.accumulate={parts}; make it a multiple of {devices * parts}"
        )
