"""Everything that ``benchmarks.auto`` compares, the methods that lost as well."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

import nag_jax


class Recipe(NamedTuple):
    """What the example's config says beside the optimizer."""

    total: int  # steps
    warmup: int
    clip: float
    weight_decay: float
    convention: str


Hyper = dict[str, Any]
Maker = Callable[[Recipe, Hyper], optax.GradientTransformation]


class Method(NamedTuple):
    make: Maker
    tuned: tuple[str, ...] = ()  # names of grids
    evaluate: Callable[[Any, Any], Any] = lambda params, state: params


def with_recipe(
    method: Method, recipe: Recipe, hyper: Hyper
) -> optax.GradientTransformationExtraArgs:
    """The method after the recipe's clipping and weight decay, which all share."""
    links = []
    if recipe.clip:
        links.append(optax.clip_by_global_norm(recipe.clip))
    if recipe.weight_decay:
        mask = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        links.append(optax.add_decayed_weights(recipe.weight_decay, mask))
    return optax.chain(*links, method.make(recipe, hyper))


def cosine(recipe: Recipe, peak: Any = 1.0) -> optax.Schedule:
    """The examples' schedule: one epoch of warm-up, then a cosine down to 0."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, recipe.warmup, recipe.total)
    return lambda step: peak * shape(step)


def _nag(recipe: Recipe, hyper: Hyper) -> optax.GradientTransformation:
    return nag_jax.nag(
        cosine(recipe, hyper["rate"]), hyper["momentum"], convention=recipe.convention
    )


METHODS: dict[str, Method] = {
    "nag": Method(_nag, ("rate", "momentum"), nag_jax.eval_params),
    "adam": Method(lambda r, h: optax.adam(cosine(r, h["rate"])), ("adam_rate",)),
    "nag, constant": Method(
        lambda r, h: nag_jax.nag(h["rate"], 0.9, convention=r.convention),
        ("rate",),
        nag_jax.eval_params,
    ),
    "adam 1e-3": Method(lambda r, h: optax.adam(1e-3)),
    "adam 1e-3, cosine": Method(lambda r, h: optax.adam(cosine(r, 1e-3))),
    "nadam 1e-3, cosine": Method(lambda r, h: optax.nadam(cosine(r, 1e-3))),
    "prodigy": Method(lambda r, h: contrib.prodigy()),
    "prodigy, cosine": Method(lambda r, h: contrib.prodigy(cosine(r))),
    "dog": Method(lambda r, h: contrib.dog()),
    "dowg": Method(lambda r, h: contrib.dowg()),
    "mechanize(nag)": Method(
        lambda r, h: contrib.mechanize(nag_jax.nag(1.0)),
    ),
    "mechanize(nag), cosine": Method(lambda r, h: contrib.mechanize(nag_jax.nag(cosine(r)))),
}
METHODS |= {
    "nag_auto": Method(lambda r, h: nag_jax.nag_auto(), (), nag_jax.eval_params),
    "nag_auto, cosine": Method(
        lambda r, h: nag_jax.nag_auto(
            optax.cosine_decay_schedule(1.0, r.total), evaluate="iterate"
        ),
        (),
        nag_jax.eval_params,
    ),
    "nag_auto, momentum 0.95": Method(
        lambda r, h: nag_jax.nag_auto(momentum=0.95), (), nag_jax.eval_params
    ),
}
