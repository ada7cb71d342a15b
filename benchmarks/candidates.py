"""Everything that ``benchmarks.auto`` compares, the methods that lost as well."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import nag_jax
from nag_jax import rules


class Recipe(NamedTuple):
    """The settings of the example's config apart from the optimizer."""

    total: int  # steps
    warmup: int
    clip: float
    weight_decay: float
    convention: Literal["optax", "sutskever"]


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


# What lost, each as a head that finds the step before Nesterov's extrapolation.


class Head(NamedTuple):
    learning_rate: jax.Array  # shape=()
    memory: Any


def head(init: Callable[[Any], Any], rule: Callable[..., Any]) -> optax.GradientTransformation:
    """``-lr*g`` with ``lr, memory = rule(g, memory, params, extra_args)``."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        g = updates
        lr, memory = rule(g, state.memory, params, extra)
        return jax.tree.map(lambda g: -lr * g, g), Head(lr, memory)

    start = lambda params: Head(jnp.zeros([]), init(params))
    return optax.GradientTransformationExtraArgs(start, update)


def distance(scale: float, *, weighted: bool = False) -> optax.GradientTransformation:
    """DoG (Ivgi et al. 2023), or DoWG (Khaled et al. 2023); optax's have no factor."""

    def init(params: Any) -> Any:
        first = 1e-3 * (1 + optax.tree.norm(params))
        return jax.tree.map(jnp.array, params), first, jnp.zeros([])

    def rule(g: Any, memory: Any, params: Any, extra: Any) -> Any:
        start, r, total = memory
        r = jnp.maximum(r, optax.tree.norm(optax.tree.sub(params, start)))
        weight = r**2 if weighted else 1.0
        total = total + weight * optax.tree.norm(g, squared=True)
        return scale * r * jnp.sqrt(weight / (total + 1e-20)), (start, r, total)

    return head(init, rule)


def layers(scale: float) -> optax.GradientTransformation:
    """DoG with a distance for each leaf."""
    make = lambda: distance(scale)

    def init(params: Any) -> Any:
        return [make().init(leaf) for leaf in jax.tree.leaves(params)]

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        g = updates
        leaves, tree = jax.tree.flatten(g)
        pairs = [
            make().update(*leaf)
            for leaf in zip(leaves, state, jax.tree.leaves(params), strict=True)
        ]
        return tree.unflatten([u for u, _ in pairs]), [memory for _, memory in pairs]

    return optax.GradientTransformationExtraArgs(init, update)


def line_search(scale: float) -> optax.GradientTransformation:
    """Armijo's condition on each mini-batch (Vaswani et al. 2019); needs more function values."""

    def rule(g: Any, lr: Any, params: Any, extra: Any) -> Any:
        value, value_fn = extra["value"], extra["value_fn"]
        slope = 0.1 * optax.tree.norm(g, squared=True)
        after = lambda lr: value_fn(jax.tree.map(lambda p, g: p - lr * g, params, g))
        long = lambda lr: ~(after(lr) <= value - lr * slope) & (lr > 1e-8)
        lr = jax.lax.while_loop(long, lambda lr: 0.7 * lr, 1.1 * lr)
        return scale * lr, lr

    return head(lambda params: jnp.ones([]), rule)


def curvature(scale: float) -> optax.GradientTransformation:
    """Step over the curvature along the gradient, from one more value, both averaged."""

    def rule(g: Any, memory: Any, params: Any, extra: Any) -> Any:
        squares, bend, k, last = memory
        energy = optax.tree.norm(g, squared=True)
        t = jnp.where(k == 0, 1e-3 / (1e-9 + jnp.sqrt(energy)), last)
        there = extra["value_fn"](jax.tree.map(lambda p, g: p - t * g, params, g))
        found = jnp.abs(2 * (there - extra["value"] + t * energy) / t**2)
        squares = 0.9 * squares + 0.1 * energy
        bend = 0.9 * bend + 0.1 * jnp.where(jnp.isfinite(found), found, 0.0)
        lr = squares / (bend + 1e-20)
        lr = jnp.where(k == 0, lr, jnp.minimum(lr, 1.2 * last))
        return scale * lr * jnp.minimum((k + 1) / 10, 1.0), (squares, bend, k + 1, lr)

    zero = jnp.zeros([])
    return head(lambda params: (zero, zero, zero, zero), rule)


def hypergradient(size: float, first: float, *, relative: bool) -> optax.GradientTransformation:
    """SGDN-HD (Baydin et al. 2018) in the trace form; relative: on log lr, by the cosine."""

    def init(params: Any) -> Head:
        zeros = optax.tree.zeros_like(params)
        return Head(jnp.asarray(first), (zeros, zeros))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        g = updates
        lr, (trace, before) = state.learning_rate, state.memory
        product = optax.tree.vdot(g, before)
        cosine = product / (optax.tree.norm(g) * optax.tree.norm(before) + 1e-20)
        lr = lr * jnp.exp(size * cosine) if relative else jnp.maximum(lr + size * product, 0.0)
        trace = jax.tree.map(lambda b, g: 0.9 * b + g, trace, g)
        step = jax.tree.map(lambda b, g: g + 0.9 * b, trace, g)
        return jax.tree.map(lambda d: -lr * d, step), Head(lr, (trace, step))

    return optax.GradientTransformationExtraArgs(init, update)


def trust_ratio(rate: float) -> optax.GradientTransformation:
    """Each leaf moves by ``rate`` of its norm, of at least 0.01 for each entry (as LARS)."""

    def one(g: jax.Array, p: jax.Array) -> jax.Array:
        size = jnp.maximum(jnp.linalg.norm(p.ravel()), 0.01 * p.size**0.5)
        return -rate * size * g / (jnp.linalg.norm(g.ravel()) + 1e-12)

    return optax.stateless(lambda g, params: jax.tree.map(one, g, params))


def under_nesterov(make: Callable[[], optax.GradientTransformation]) -> Method:
    """The head, Nesterov's extrapolation, and the average to evaluate, as nag_auto."""
    kernel = nag_jax.accelerate(rules.nesterov(0.9))
    whole = lambda recipe, hyper: nag_jax.averaged(optax.chain(make(), kernel))
    return Method(whole, (), nag_jax.eval_params)


def _averaged(make: Callable[[], optax.GradientTransformation]) -> Method:
    return Method(lambda recipe, hyper: nag_jax.averaged(make()), (), nag_jax.eval_params)


METHODS: dict[str, Method] = {
    "nag": Method(_nag, ("rate", "momentum"), nag_jax.eval_params),
    "adam": Method(lambda r, h: optax.adam(cosine(r, h["rate"])), ("adam_rate",)),
    "averaged(nag), constant": Method(
        lambda r, h: nag_jax.averaged(nag_jax.nag(h["rate"], 0.9, convention=r.convention)),
        ("rate",),
        nag_jax.eval_params,
    ),
    "nag, constant": Method(
        lambda r, h: nag_jax.nag(h["rate"], 0.9, convention=r.convention),
        ("rate",),
        nag_jax.eval_params,
    ),
    "adam 1e-3": Method(lambda r, h: optax.adam(1e-3)),
    "adam 1e-3, cosine": Method(lambda r, h: optax.adam(cosine(r, 1e-3))),
    "nadam 1e-3, cosine": Method(lambda r, h: optax.nadam(cosine(r, 1e-3))),
    "prodigy": Method(lambda r, h: contrib.prodigy()),
    "prodigy, cosine": Method(
        lambda r, h: contrib.prodigy(optax.cosine_decay_schedule(1.0, r.total))
    ),
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
    "DoG, 0.3, under Nesterov": under_nesterov(lambda: distance(0.3)),
    "DoWG, 0.1, under Nesterov": under_nesterov(lambda: distance(0.1, weighted=True)),
    "DoG by leaf, 0.3, under Nesterov": under_nesterov(lambda: layers(0.3)),
    "line search, 0.3, under Nesterov": under_nesterov(lambda: line_search(0.3)),
    "curvature, 0.3, under Nesterov": under_nesterov(lambda: curvature(0.3)),
    "trust ratio 0.003, under Nesterov": under_nesterov(lambda: trust_ratio(0.003)),
    "hypergradient 1e-3": _averaged(lambda: hypergradient(1e-3, 1e-3, relative=False)),
    "hypergradient, log, 0.05": _averaged(lambda: hypergradient(0.05, 0.01, relative=True)),
}
