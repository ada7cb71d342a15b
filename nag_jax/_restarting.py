"""What ``accelerate`` does with a restart condition; the conditions are in ``restart.py``."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import map_gradients, mix, varying_axes, wide
from nag_jax._checks import given_scalar
from nag_jax.rules.rule import Coefficients


class Seen(NamedTuple):
    """What a condition may look at: x is the iterate, u the step that the chain proposes."""

    steps: jax.Array  # since the last restart, int32 []
    remembered: jax.Array  # what the condition returned last, float []; 0 at first
    u: Any  # like params
    v: Any  # x_{k+1} - x_k = m + u, like params
    dot: Callable[[Any, Any], jax.Array]  # real inner product over all leaves and devices
    value: Any  # of the loss at params, if update was called with value=; mean over devices


class RestartState(NamedTuple):
    """What a restart condition adds to the state of ``accelerate``."""

    restarts: jax.Array  # how often it fired, shape=(), int32
    steps: jax.Array  # since the last restart, shape=(), int32
    remembered: jax.Array  # shape=(), default float dtype


Condition = Callable[[Seen], tuple[Any, Any]]

# Of the sums on one CPU; in elements.
_SLICES = 7  # in one loop: more are read from too many places at once, fewer leave more to write
_LOOPS = 2  # of a large array; XLA would write it out if there were more than 15 slices of it
_TOGETHER = 16  # arrays in one loop
_SMALL = 2**12  # from here on the only array of its size is cut into slices
_LARGE = 2**18  # from here on each is: bytes take the time then, not the number of loops


def start() -> RestartState:
    """The state before the first step."""
    zero = lambda dtype: jnp.zeros([], dtype)  # one buffer each, so that all can be donated
    return RestartState(restarts=zero(jnp.int32), steps=zero(jnp.int32), remembered=zero(float))


def decide(
    condition: Condition, state: Any, u: Any, m: Any, axis_name: Any, loss: Any
) -> tuple[jax.Array, RestartState]:
    """Whether to restart now, and the state after that."""
    v = map_gradients(lambda u, m: mix(1.0, m, 1.0, u), u, m)
    real = state.remembered.dtype
    dot = lambda a, b: inner_product(a, b, axis_name).astype(real)
    # Else each device would decide by the loss of its own rows, and the copies part.
    loss = None if loss is None else _mean(given_scalar("value", loss), axis_name).astype(real)
    result = condition(Seen(state.steps, state.remembered, u, v, dot, loss))
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise ValueError(
            f"a restart condition must return a pair (fire, remembered), got {result!r}; return "
            "seen.remembered where there is nothing to remember"
        )
    fire = given_scalar("what a restart condition returns first", result[0]).astype(bool)
    remembered = given_scalar("what a restart condition returns second", result[1])
    return fire, RestartState(
        restarts=jnp.where(fire, optax.safe_increment(state.restarts), state.restarts),
        steps=jnp.where(fire, 0, optax.safe_increment(state.steps)),
        remembered=remembered.astype(real),
    )


def check_rule(c: Coefficients) -> None:
    """Raises ValueError for a rule that a restart would not bring back to the gradient step."""
    for scalar in (c.direct, c.lookahead):
        if not isinstance(scalar, int | float) or scalar != 1:
            raise ValueError(
                "restart needs a rule with update = u + m', got direct="
                f"{c.direct}, lookahead={c.lookahead}; use rules.fista(), nesterov(), ogm(), ..."
            )


def inner_product(a: Any, b: Any, axis_name: Any) -> jax.Array:
    """Real part of <a, b> over all leaves, and over the devices of ``axis_name``, in float32."""
    alone = axis_name is None and _on_one_cpu(a, b)
    each = _sum_few(_products(a, b)) if alone else inner_products(a, b, axis_name)
    total = sum((term.astype(float) for term in each), jnp.zeros([], float))
    # XLA on CPU would repeat this sum in the loops of each leaf, and take minutes to compile
    # hundreds of them. A sort, here of two equal numbers, is what it never fuses.
    return jax.lax.sort(jnp.stack([total, total]))[0] if len(each) > 1 and _on_cpu() else total


def inner_products(a: Any, b: Any, axis_name: Any) -> list[jax.Array]:
    """The same for each leaf by itself."""
    alone = axis_name is None and _on_one_cpu(a, b)
    terms, last = [], None
    for x in _products(a, b):
        if alone and x.size >= _LARGE:
            sums = _sum_slices(x.reshape(-1), last)
            last = sums[-1]
            terms.append(functools.reduce(jnp.add, sums))
        else:
            terms.append(jnp.sum(x))
    axes = _names(axis_name)
    # A leaf that all devices hold in full counts once, where shard_map tells which those are.
    varying = [varying_axes(x) & set(axes) for x in terms]
    over = [tuple(vary) if any(varying) else axes for vary in varying]
    for group in set(over) - {()}:
        members = [i for i, axes in enumerate(over) if axes == group]
        summed = jax.lax.psum([terms[i] for i in members], group)
        for i, term in zip(members, summed, strict=True):
            terms[i] = term
    return terms


def _mean(x: jax.Array, axis_name: Any) -> jax.Array:
    """Over the devices of ``axis_name``, where shard_map does not tell that all hold the same."""
    axes = _names(axis_name)
    over = tuple(axis for axis in axes if axis in varying_axes(x)) or axes
    return jax.lax.pmean(wide(x), over) if over else x


def _names(axis_name: Any) -> tuple[Any, ...]:
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _products(a: Any, b: Any) -> list[jax.Array]:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [(jnp.conj(wide(x)) * wide(y)).real for x, y in pairs]


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _on_one_cpu(*trees: Any) -> bool:
    """Whether leaves may be reshaped and added to each other without moving their shards."""
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(trees)]
    return _on_cpu() and jax.device_count() == 1 and not any(any(s.spec) for s in shardings)


def _sum_few(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sums that add up to the sum of all elements, on one CPU in little more than one pass."""
    alike: dict[Any, list[jax.Array]] = {}
    for x in arrays:
        alike.setdefault((x.size, x.dtype), []).append(x.reshape(-1))
    sums, last = [], None
    for group in alike.values():
        if group[0].size >= (_LARGE if len(group) > 1 else _SMALL):
            for x in group:
                sums += _sum_slices(x, last)
                last = sums[-1]
        else:
            batches = -(-len(group) // _TOGETHER)
            sums += [_sum_together(group[i::batches]) for i in range(batches)]
    return sums


def _sum_slices(x: jax.Array, before: jax.Array | None) -> list[jax.Array]:
    """Sums that add up to the sum of all elements; the last is made last, all after ``before``."""
    loops = _LOOPS if x.size >= _LARGE else 1
    size = x.size // (loops * _SLICES)
    slices = [x[i * size : (i + 1) * size] for i in range(loops * _SLICES)]
    sums = [jnp.sum(x[len(slices) * size :])] if x.size % len(slices) else []
    for i in range(loops):
        first, *others = slices[i * _SLICES : (i + 1) * _SLICES]
        if before is not None:
            # Adds nothing. But XLA would go through all loops first, and keep what they write; so
            # each waits for the sum of the one before it, and writes where that has written.
            first += jnp.where(before > 0, 0.0, -0.0).astype(x.dtype)
        before = _sum_together([first, *others])
        sums.append(before)
    return sums


def _sum_together(arrays: list[jax.Array]) -> jax.Array:
    """The sum of all elements of arrays of one length."""
    *others, last = arrays
    if not others:
        return jnp.sum(last)
    first = functools.reduce(jnp.add, others)
    # XLA on CPU hands a plain sum to a library, with all that is added for it, and first writes
    # out what is needed elsewhere too, such as the step u. This select, of what an addition would
    # give anyway, is not the library's: up to it, all is one loop that writes out little.
    return jnp.sum(jax.lax.select(first != first, first, first + last))
