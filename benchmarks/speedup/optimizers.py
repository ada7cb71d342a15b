"""The contestants: how each is made, and which second hyperparameter is tuned with its rate."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nag_jax
from nag_jax import rules

MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
FINE_MOMENTA = tuple(1 - 2 ** (-j / 2) for j in range(25))  # where theory wants one near 1
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LOOKAHEADS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
EMA_DECAY = 0.99
WARMUP = 0.05  # of the steps


class Setting(NamedTuple):
    """What all optimizers of a task share."""

    steps: int
    decays: bool = False  # linear warm-up, then a cosine to 0; else a constant learning rate
    clip: float = 0.0  # largest global norm of the gradient; 0: no limit
    period: int = 0  # of Sutskever's momentum schedule, up to the tuned one; 0: constant


Hyper = dict[str, Any]


class Optimizer(NamedTuple):
    """``make(setting, hyper)`` with hyper's rate, and momentum or decay where it has ladders."""

    title: str
    make: Callable[[Setting, Hyper], optax.GradientTransformation]
    rate: float | None  # in the middle of the first grid; None: nothing to tune
    second: str = ""  # momentum | decay
    ladder: tuple[float, ...] = (0.0,)
    first: tuple[int, ...] = (0,)  # positions on the ladder in the first grid
    evaluate: Callable[[Any, Any], Any] = lambda params, state: params
    exact: bool = False  # needs exact gradients
    adaptive: bool = False  # its rate is a length, whatever the gradient's scale


def rate(setting: Setting, peak: Any) -> Any:
    if not setting.decays:
        return peak
    warmup = round(WARMUP * setting.steps)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, setting.steps)
    # One step later, so that no first step is wasted on a rate of 0.
    return lambda step: peak * shape(step + 1)


def momentum(setting: Setting, largest: Any) -> Any:
    """The momentum itself, or the 2013 paper's schedule up to it, 0.9 at the very end."""
    if not setting.period:
        return largest
    shape = nag_jax.schedules.sutskever(
        0.9999, period=setting.period, total_steps=setting.steps,
        final_steps=setting.steps // 20,
    )  # fmt: skip
    return lambda step: jnp.minimum(shape(step), largest)


def _nag(
    convention: Literal["optax", "sutskever"],
) -> Callable[[Setting, Hyper], optax.GradientTransformation]:
    return lambda s, h: nag_jax.nag(
        rate(s, h["rate"]), momentum(s, h["momentum"]), convention=convention
    )


def _heavy_ball(s: Setting, h: Hyper) -> optax.GradientTransformation:
    if not s.period:
        return optax.sgd(rate(s, h["rate"]), h["momentum"])
    kernel = nag_jax.accelerate(rules.heavy_ball(momentum(s, h["momentum"])))
    return optax.chain(optax.sgd(rate(s, h["rate"])), kernel)


def _muon(*, nesterov: bool) -> Callable[[Setting, Hyper], optax.GradientTransformation]:
    """For the matrices between embedding and logits; Adam for the rest, at the same rate.

    Muon's updates have the size of Adam's (arXiv:2502.16982), so that one rate fits both.
    """
    return lambda s, h: optax.contrib.muon(
        rate(s, h["rate"]),
        beta=h.get("momentum", 0.95),
        nesterov=nesterov,
        muon_weight_dimension_numbers=_hidden_matrices,
        consistent_rms=0.2,
    )


def _hidden_matrices(params: Any) -> Any:
    """Muon's dimension numbers of these, None for other parameters."""
    matrix = optax.contrib.MuonDimensionNumbers()
    hidden = lambda path, p: (
        matrix if "blocks" in jax.tree_util.keystr(path) and p.ndim == 2 else None
    )
    return jax.tree.map_with_path(hidden, params)


def _ema_nesterov(base: Any) -> Callable[[Setting, Hyper], optax.GradientTransformation]:
    """A look-ahead in about the window of the authors' speed-runs."""

    def make(s: Setting, h: Hyper) -> optax.GradientTransformation:
        window = dict(start=round(0.15 * s.steps), end=round(0.75 * s.steps))
        ahead = nag_jax.schedules.follow_learning_rate(h["lookahead"], rate(s, h["rate"]), **window)
        kernel = nag_jax.accelerate(rules.ema_nesterov(EMA_DECAY, ahead))
        return optax.chain(base(s, h), kernel)

    return make


def _adamw(s: Setting, h: Hyper) -> optax.GradientTransformation:
    return optax.adamw(rate(s, h["rate"]))


def _with_momentum(title: str, make: Any, middle: float, **more: Any) -> Optimizer:
    return Optimizer(title, make, middle, "momentum", MOMENTA, (3, 5), **more)


def _looking_ahead(title: str, base: Any) -> Optimizer:
    return Optimizer(
        title, _ema_nesterov(base), 0.004, "lookahead", LOOKAHEADS, (3, 5),
        evaluate=nag_jax.eval_params, adaptive=True,
    )  # fmt: skip


def _exact(title: str, make: Any, middle: float | None) -> Optimizer:
    return Optimizer(title, make, middle, evaluate=nag_jax.eval_params, exact=True)


OPTIMIZERS = {
    "sgd": Optimizer("SGD", lambda s, h: optax.sgd(rate(s, h["rate"])), 0.25),
    "heavy_ball": _with_momentum("heavy ball", _heavy_ball, 0.03),
    "nag": _with_momentum("NAG (optax)", _nag("optax"), 0.03, evaluate=nag_jax.eval_params),
    "nag_sutskever": _with_momentum(
        "NAG (Sutskever)", _nag("sutskever"), 0.03, evaluate=nag_jax.eval_params
    ),
    "adam": _with_momentum(
        "Adam", lambda s, h: optax.adam(rate(s, h["rate"]), h["momentum"]), 0.004, adaptive=True
    ),
    "adamw": Optimizer(
        "AdamW",
        lambda s, h: optax.adamw(rate(s, h["rate"]), weight_decay=h["decay"]),
        0.004, "decay", DECAYS, (2, 4), adaptive=True,
    ),
    "nadam": _with_momentum(
        "Nadam", lambda s, h: optax.nadam(rate(s, h["rate"]), h["momentum"]), 0.004, adaptive=True
    ),
    "nag_auto": Optimizer(
        "nag_auto", lambda s, h: nag_jax.nag_auto(), None, evaluate=nag_jax.eval_params
    ),
    "fista": _exact("FISTA", lambda s, h: nag_jax.fista(h["rate"], restart=None), 0.25),
    "fista_restart": _exact("FISTA + restart", lambda s, h: nag_jax.fista(h["rate"]), 0.25),
    "backtracking": _exact("backtracking", lambda s, h: nag_jax.backtracking(), None),
}  # fmt: skip

# For the transformer only. The second hyperparameter is the momentum of Muon and of SNOO's outer
# steps, the decay of the averages of GPA and Schedule-Free, and EMA-Nesterov's largest look-ahead.
NEWER = {
    "muon": _with_momentum("Muon", _muon(nesterov=False), 0.004, adaptive=True),
    "muon_nesterov": _with_momentum("Muon, Nesterov", _muon(nesterov=True), 0.004, adaptive=True),
    "ema_muon": _looking_ahead("EMA-Nesterov(Muon)", _muon(nesterov=True)),
    "ema_adamw": _looking_ahead("EMA-Nesterov(AdamW)", _adamw),
    "snoo": Optimizer(
        "SNOO(AdamW)",
        lambda s, h: nag_jax.snoo(_adamw(s, h), momentum=h["momentum"]),
        0.004, "momentum", MOMENTA, (1, 3), evaluate=nag_jax.eval_params, adaptive=True,
    ),
    "gpa": _with_momentum(
        "GPA(AdamW)",
        lambda s, h: optax.chain(_adamw(s, h), nag_jax.accelerate(rules.gpa(h["momentum"]))),
        0.004, evaluate=nag_jax.eval_params, adaptive=True,
    ),
    "schedule_free": Optimizer(
        "Schedule-Free AdamW",
        lambda s, h: optax.contrib.schedule_free_adamw(
            h["rate"], round(WARMUP * s.steps), b1=h["momentum"]
        ),
        0.004, "momentum", MOMENTA[1:], (2, 4), evaluate=nag_jax.eval_params, adaptive=True,
    ),
}  # fmt: skip


def transformation(
    optimizer: Optimizer, setting: Setting, hyper: Hyper
) -> optax.GradientTransformationExtraArgs:
    links = [optax.clip_by_global_norm(setting.clip)] if setting.clip else []
    return optax.chain(*links, optimizer.make(setting, hyper))
