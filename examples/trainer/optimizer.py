"""The optimizer that a config describes, and the hyperparameters it used, for the log.

To add an optimizer, add a row to ``OPTIMIZERS`` and its name to the list in configs/default.py. If
it uses a field that only some optimizers use (such as ``optimizer.b2``), add it to that field in
options/effects.py; tests/trainer/test_effects.py checks this.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nag_jax
from examples.trainer.errors import UserError
from nag_jax import rules


class Settings(NamedTuple):
    """What an optimizer is built from."""

    learning_rate: optax.Schedule  # config.learning_rate, with warm-up and decay
    momentum: optax.ScalarOrSchedule  # config.momentum, with config.momentum_schedule
    total_steps: int  # updates in the whole run
    config: Any


class Choice(NamedTuple):
    """A value of ``config.optimizer.name``."""

    build: Callable[[Settings], optax.GradientTransformation]
    # How it uses config.momentum; only "scheduled" allows another config.momentum_schedule.
    momentum: Literal["scheduled", "constant", "none"]
    # "fixed" and "found": without the schedule, so without config.find_lr and config.plateau.
    learning_rate: Literal["scheduled", "fixed", "found"] = "scheduled"


def weight_matrices(params: Any) -> Any:
    """The mask of weight decay: matrices and kernels, but not biases."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def with_l2(
    s: Settings, *transformations: optax.GradientTransformation
) -> optax.GradientTransformation:
    """For optimizers without weight decay of their own: adds it to the gradient."""
    return optax.chain(
        optax.add_decayed_weights(s.config.weight_decay, weight_matrices), *transformations
    )


def nag(s: Settings) -> optax.GradientTransformation:
    return nag_jax.nag(
        s.learning_rate,
        s.momentum,
        convention=s.config.optimizer.convention,
        weight_decay=s.config.weight_decay,
        weight_decay_mask=weight_matrices,
        decay=s.config.decay,
    )


def nag_then_sgd(s: Settings) -> optax.GradientTransformation:
    return nag_jax.nag_then_sgd(
        s.config.learning_rate,
        s.config.momentum,
        switch_step=s.config.optimizer.switch_step,
        transition_steps=s.config.optimizer.transition_steps,
        weight_decay=s.config.weight_decay,
        weight_decay_mask=weight_matrices,
        decay=s.config.decay,
    )


def sgd_with(s: Settings, rule: rules.Rule) -> optax.GradientTransformation:
    """SGD, accelerated by a rule."""
    return with_l2(s, optax.sgd(s.learning_rate), nag_jax.accelerate(rule))


def ema_nesterov(s: Settings) -> optax.GradientTransformation:
    """AdamW with a look-ahead in about the window of the authors' speed-runs."""
    start = round(0.15 * s.total_steps)
    end = max(round(0.75 * s.total_steps), start + 1)
    ahead = nag_jax.schedules.follow_learning_rate(0.3, s.learning_rate, start=start, end=end)
    adamw = optax.adamw(s.learning_rate, **b1_b2(s), **decayed(s))
    return optax.chain(adamw, nag_jax.accelerate(rules.ema_nesterov(0.99, ahead)))


def b1_b2(s: Settings) -> dict[str, Any]:
    return dict(b1=s.config.momentum, b2=s.config.optimizer.b2)


def decayed(s: Settings) -> dict[str, Any]:
    return dict(weight_decay=s.config.weight_decay, mask=weight_matrices)


# Rules use the defaults of their papers. Rules that need a constant of the problem or the number of
# steps are not offered.
OPTIMIZERS: dict[str, Choice] = {
    "nag": Choice(nag, momentum="scheduled"),
    "averaged": Choice(lambda s: nag_jax.averaged(nag(s)), momentum="scheduled"),
    "lookahead": Choice(lambda s: nag_jax.lookahead(nag(s)), momentum="scheduled"),
    "snoo": Choice(lambda s: nag_jax.snoo(nag(s)), momentum="scheduled"),
    "nag_then_sgd": Choice(nag_then_sgd, momentum="constant", learning_rate="fixed"),
    "nag_auto": Choice(
        lambda s: with_l2(s, nag_jax.nag_auto(momentum=s.momentum)),
        momentum="scheduled",
        learning_rate="found",
    ),
    "heavy_ball": Choice(lambda s: sgd_with(s, rules.heavy_ball(s.momentum)), momentum="scheduled"),
    "fista": Choice(lambda s: sgd_with(s, rules.fista()), momentum="none"),
    "chambolle_dossal": Choice(lambda s: sgd_with(s, rules.chambolle_dossal()), momentum="none"),
    "ogm": Choice(lambda s: sgd_with(s, rules.ogm()), momentum="none"),
    "estimate_sequence": Choice(
        lambda s: sgd_with(s, rules.estimate_sequence(s.learning_rate)), momentum="none"
    ),
    "qhm": Choice(lambda s: sgd_with(s, rules.qhm()), momentum="none"),
    "gpa": Choice(lambda s: sgd_with(s, rules.gpa()), momentum="none"),
    "agnes": Choice(lambda s: sgd_with(s, rules.agnes()), momentum="none"),
    "mass": Choice(lambda s: sgd_with(s, rules.mass()), momentum="none"),
    "accsgd": Choice(lambda s: sgd_with(s, rules.accsgd()), momentum="none"),
    "srsgd": Choice(lambda s: sgd_with(s, rules.srsgd()), momentum="none"),
    "sgd": Choice(lambda s: with_l2(s, optax.sgd(s.learning_rate)), momentum="none"),
    "momentum": Choice(
        lambda s: with_l2(s, optax.sgd(s.learning_rate, s.config.momentum)), momentum="constant"
    ),
    "nesterov": Choice(
        lambda s: with_l2(s, optax.sgd(s.learning_rate, s.config.momentum, nesterov=True)),
        momentum="constant",
    ),
    "adam": Choice(
        lambda s: with_l2(s, optax.adam(s.learning_rate, **b1_b2(s))), momentum="constant"
    ),
    "adamw": Choice(
        lambda s: optax.adamw(s.learning_rate, **b1_b2(s), **decayed(s)), momentum="constant"
    ),
    "ema_nesterov": Choice(ema_nesterov, momentum="constant"),
    "nadam": Choice(
        lambda s: with_l2(s, optax.nadam(s.learning_rate, **b1_b2(s))), momentum="constant"
    ),
    "nadamw": Choice(
        lambda s: optax.nadamw(s.learning_rate, **b1_b2(s), **decayed(s)), momentum="constant"
    ),
}


class Optimizer(NamedTuple):
    """A transformation, and a function that reports what it used at a step.

    ``hyperparameters(opt_state, step, scale) -> {name: value}`` may leave values on the device.
    """

    transformation: optax.GradientTransformationExtraArgs
    hyperparameters: Callable[[Any, int, float], dict[str, Any]]


def make_optimizer(
    config: Any, steps_per_epoch: int, total_steps: int, rate: optax.Schedule | None = None
) -> Optimizer:
    """Builds the optimizer.

    Args:
      config: the config of the run.
      steps_per_epoch: updates in an epoch.
      total_steps: updates in the whole run.
      rate: replaces the config's schedule of the learning rate.

    Returns:
      The optimizer. With ``config.plateau.patience`` its state holds a factor on the learning rate
      in ``hyperparams["scale"]``.

    Raises:
      UserError: if a value of the config is out of range or unknown.
    """
    choice = _choose(config)
    _check_values(config, choice, rate)
    try:
        # Also for optimizers that ignore some of these, so that a bad value is always an error.
        nag_jax.nag(config.learning_rate, config.momentum, weight_decay=config.weight_decay)
        schedule = rate or _learning_rate(config, steps_per_epoch, total_steps)
        momentum = _momentum(config, steps_per_epoch, total_steps)
        settings = Settings(schedule, momentum, total_steps, config)
        build = lambda rate: _complete(config, choice.build(settings._replace(learning_rate=rate)))
        transformation = build(schedule)  # also with a plateau, so that errors are raised here
        if config.plateau.patience:
            scaled = lambda scale: build(lambda step: scale * schedule(step))
            transformation = optax.inject_hyperparams(scaled)(scale=1.0)
    except ValueError as error:
        raise UserError(f"config: {error}") from None
    if choice.learning_rate == "fixed":
        schedule, momentum = _hand_over(config)

    def hyperparameters(opt_state: Any, step: int, scale: float) -> dict[str, Any]:
        at_step = lambda value: float(rules.at_step(value, jnp.asarray(step)))
        if choice.learning_rate == "found":
            used = _found_rates(opt_state)
        else:
            used = {"learning_rate": scale * at_step(schedule)}
        return used if choice.momentum == "none" else used | {"momentum": at_step(momentum)}

    return Optimizer(transformation, hyperparameters)


def _choose(config: Any) -> Choice:
    name = config.optimizer.name
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UserError(f"config.optimizer.name must be one of {known}, got {name!r}")
    return OPTIMIZERS[name]


def _check_values(config: Any, choice: Choice, rate: optax.Schedule | None) -> None:
    name = config.optimizer.name
    if choice.learning_rate != "scheduled" and (rate or config.plateau.patience):
        raise UserError(
            f"config.optimizer.name={name} sets its own learning rate, so config.find_lr and "
            "config.plateau cannot change it; use nag"
        )
    if config.momentum_schedule != "constant" and choice.momentum != "scheduled":
        scheduled = [name for name, other in OPTIMIZERS.items() if other.momentum == "scheduled"]
        raise UserError(
            f"config.optimizer.name={name} cannot schedule its momentum: leave "
            f"config.momentum_schedule at constant, or use one of {', '.join(scheduled)}"
        )
    if not 0 <= config.optimizer.b2 < 1:
        raise UserError(f"config.optimizer.b2 must be in [0, 1), got {config.optimizer.b2}")


def _complete(
    config: Any, transformation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Adds clipping before it; a GAN gets one optimizer for each network."""
    if config.clip_norm:
        transformation = optax.chain(optax.clip_by_global_norm(config.clip_norm), transformation)
    transformation = optax.with_extra_args_support(transformation)
    if config.task != "adversarial":
        return transformation
    players: Any = {"generator": transformation, "discriminator": transformation}
    label = lambda params: type(params)({name: name for name in params})
    return optax.partition(players, label)


def _learning_rate(config: Any, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if config.schedule == "cosine":
        end = max(total_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, end)
    if config.schedule == "constant":
        if not warmup:  # optax's schedule would stay at 0
            return optax.constant_schedule(config.learning_rate)
        return optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
    raise UserError(f"config.schedule must be one of constant, cosine, got {config.schedule!r}")


def _momentum(config: Any, steps_per_epoch: int, total_steps: int) -> optax.ScalarOrSchedule:
    kind, top = config.momentum_schedule, config.momentum
    if kind == "constant":
        return top
    if kind == "sutskever":
        final = min(1000, total_steps // 2)
        return nag_jax.schedules.sutskever(top, total_steps=total_steps, final_steps=final)
    if kind == "convex":
        return nag_jax.schedules.convex()
    if kind == "linear":
        warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
        return nag_jax.schedules.linear(top, initial=0.5 * top, warmup_steps=warmup)
    known = "constant, sutskever, convex, linear"
    raise UserError(f"config.momentum_schedule must be one of {known}, got {kind!r}")


def _hand_over(config: Any) -> tuple[optax.Schedule, optax.Schedule]:
    """Learning rate and momentum of nag_then_sgd."""
    end, top = config.optimizer.switch_step, config.momentum
    start = end - max(config.optimizer.transition_steps, 1)
    momentum = lambda step: jnp.interp(step, jnp.array([start, end]), jnp.array([top, 0.0]))
    return lambda step: config.learning_rate * (1 - momentum(step)) / (1 - top), momentum


def _found_rates(opt_state: Any) -> dict[str, jax.Array]:
    """The learning rates that nag_auto found: one, or one for each network of a GAN."""
    found = {}
    pairs: Any = optax.tree.get_all_with_path(opt_state, "learning_rate")
    for path, rate in pairs:
        player = [f"{key.key}_" for key in path if isinstance(key, jax.tree_util.DictKey)]
        # A copy, since the next update may overwrite the state in place.
        found["".join(player) + "learning_rate"] = jnp.copy(rate)
    return found
