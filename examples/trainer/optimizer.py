"""The optimizer that a config describes, and its hyperparameters at any step, for the log."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nag_jax
from examples.trainer.errors import UserError
from nag_jax import rules


class Optimizer(NamedTuple):
    """A transformation, and what it used at a step.

    ``hyperparameters(opt_state, step, scale) -> {name: value}`` may leave values on the device.
    """

    transformation: optax.GradientTransformationExtraArgs
    hyperparameters: Callable[[Any, int, float], dict[str, Any]]


def make(
    config: Any, steps_per_epoch: int, total_steps: int, rate: optax.Schedule | None = None
) -> Optimizer:
    """Builds it; UserError where a value of the config is out of range or unknown.

    ``rate`` takes the place of the config's schedule of the learning rate. With
    ``config.plateau.patience`` the state holds a factor on it, ``hyperparams["scale"]``.
    """
    name = config.optimizer.name
    if name in ("nag_then_sgd", "nag_auto") and (rate or config.plateau.patience):
        raise UserError(
            f"config.optimizer.name={name} has a learning rate of its own, without "
            "config.find_lr and config.plateau; take nag"
        )
    if config.momentum_schedule != "constant" and name not in _SCHEDULED:
        raise UserError(
            f"config.optimizer.name={name} has no schedule of momentum: leave "
            f"config.momentum_schedule at constant, or take one of {', '.join(_SCHEDULED)}"
        )
    try:
        schedule = rate or _learning_rate(config, steps_per_epoch, total_steps)
        momentum = _momentum(config, steps_per_epoch, total_steps)
        whole = lambda rate: _for_all_params(config, _transformation(config, rate, momentum))
        transformation = whole(schedule)  # with a plateau, too: bad values fail here, not in init
        if config.plateau.patience:
            scaled = lambda scale: whole(lambda step: scale * schedule(step))
            transformation = optax.inject_hyperparams(scaled)(scale=1.0)
    except ValueError as error:
        raise UserError(f"config: {error}") from None

    if name == "nag_then_sgd":
        schedule, momentum = _hand_over(config)
    used: dict[str, Any] = {"learning_rate": schedule}
    used |= {"momentum": momentum} if name not in WITHOUT_MOMENTUM else {}

    def hyperparameters(opt_state: Any, step: int, scale: float) -> dict[str, Any]:
        found = {n: float(rules.at_step(v, jnp.asarray(step))) for n, v in used.items()}
        found["learning_rate"] *= scale
        if name == "nag_auto":
            del found["learning_rate"]
            found = _found_rates(opt_state) | found
        return found

    return Optimizer(transformation, hyperparameters)


def _hand_over(config: Any) -> tuple[optax.Schedule, optax.Schedule]:
    """Learning rate and momentum of nag_then_sgd."""
    end, top = config.optimizer.switch_step, config.momentum
    start = end - max(config.optimizer.transition_steps, 1)
    momentum = lambda step: jnp.interp(step, jnp.array([start, end]), jnp.array([top, 0.0]))
    return lambda step: config.learning_rate * (1 - momentum(step)) / (1 - top), momentum


def _for_all_params(
    config: Any, transformation: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """With clipping before it, and one for each player of a GAN."""
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
        transformation = optax.chain(clip, transformation)
    return _two_players(transformation) if config.task == "adversarial" else transformation


def _found_rates(opt_state: Any) -> dict[str, jax.Array]:
    """Of nag_auto; copies, as the state is donated. A GAN has one for each player."""
    found = {}
    pairs: Any = optax.tree.get_all_with_path(opt_state, "learning_rate")
    for path, rate in pairs:
        player = [f"{key.key}_" for key in path if isinstance(key, jax.tree_util.DictKey)]
        found["".join(player) + "learning_rate"] = jnp.copy(rate)
    return found


def _learning_rate(config: Any, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    nag_jax.nag(config.learning_rate)  # a schedule would hide a bad peak
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if config.schedule == "cosine":
        end = max(total_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, end)
    if config.schedule == "constant":
        if not warmup:  # optax's would stay at 0
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


# Those that need no constant of the problem and no horizon; with the papers' defaults.
_RULES: dict[str, Callable[[optax.ScalarOrSchedule], rules.Rule]] = {
    "heavy_ball": rules.heavy_ball,
    "fista": lambda momentum: rules.fista(),
    "chambolle_dossal": lambda momentum: rules.chambolle_dossal(),
    "ogm": lambda momentum: rules.ogm(),
    "qhm": lambda momentum: rules.qhm(),
    "gpa": lambda momentum: rules.gpa(),
    "agnes": lambda momentum: rules.agnes(),
    "mass": lambda momentum: rules.mass(),
    "accsgd": lambda momentum: rules.accsgd(),
    "srsgd": lambda momentum: rules.srsgd(),
}
_SCHEDULED = ("nag", "averaged", "lookahead", "snoo", "heavy_ball", "nag_auto")  # config.momentum
# Or with one of their own.
WITHOUT_MOMENTUM = {"sgd", "estimate_sequence", *_RULES} - {"heavy_ball"}


def _transformation(
    config: Any, rate: optax.Schedule, momentum: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    options = config.optimizer
    mask = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    decayed = dict(weight_decay=config.weight_decay, mask=mask)
    l2 = optax.add_decayed_weights(config.weight_decay, mask)
    number = config.momentum
    nag_jax.nag(1.0, number, weight_decay=config.weight_decay)
    if not 0 <= options.b2 < 1:
        raise UserError(f"config.optimizer.b2 must be in [0, 1), got {options.b2}")
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "nag": lambda: nag_jax.nag(
            rate,
            momentum,
            convention=options.convention,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            decay=config.decay,
        ),
        "nag_then_sgd": lambda: nag_jax.nag_then_sgd(
            config.learning_rate,
            number,
            switch_step=options.switch_step,
            transition_steps=options.transition_steps,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            decay=config.decay,
        ),
        "averaged": lambda: nag_jax.averaged(makers["nag"]()),
        "lookahead": lambda: nag_jax.lookahead(makers["nag"]()),
        "snoo": lambda: nag_jax.snoo(makers["nag"]()),
        "nag_auto": lambda: optax.chain(l2, nag_jax.nag_auto(momentum=momentum)),
        "estimate_sequence": lambda: optax.chain(
            l2, optax.sgd(rate), nag_jax.accelerate(rules.estimate_sequence(rate))
        ),
        "sgd": lambda: optax.chain(l2, optax.sgd(rate)),
        "momentum": lambda: optax.chain(l2, optax.sgd(rate, number)),
        "nesterov": lambda: optax.chain(l2, optax.sgd(rate, number, nesterov=True)),
        "adam": lambda: optax.chain(l2, optax.adam(rate, number, options.b2)),
        "adamw": lambda: optax.adamw(rate, number, options.b2, **decayed),
        "nadam": lambda: optax.chain(l2, optax.nadam(rate, number, options.b2)),
        "nadamw": lambda: optax.nadamw(rate, number, options.b2, **decayed),
    }
    for name, rule in _RULES.items():
        chain = optax.chain(l2, optax.sgd(rate), nag_jax.accelerate(rule(momentum)))
        makers[name] = lambda chain=chain: chain
    if options.name not in makers:
        known = ", ".join(makers)
        raise UserError(f"config.optimizer.name must be one of {known}, got {options.name!r}")
    return optax.with_extra_args_support(makers[options.name]())


def _two_players(
    transformation: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of its own for each network of a GAN."""
    players: Any = {"generator": transformation, "discriminator": transformation}
    label = lambda params: type(params)({name: name for name in params})
    return optax.partition(players, label)
