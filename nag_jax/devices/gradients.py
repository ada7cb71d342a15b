"""The loss and gradient of a batch that lies in pieces: micro-batches, devices, a remainder.

A piece is some rows of the batch, and its loss a mean over them. What the pieces give is summed
with their weights, over the pieces of a device in a scan, over the devices in one all-reduce, and
divided by the sum of the weights: the mean over the whole batch, however it was cut.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import real_like, wide


class Loss(NamedTuple):
    """The user's loss, always called alike."""

    function: Callable[..., Any]
    has_aux: bool
    weight: Callable[[Any], Any] | None  # of a piece; None: its rows

    def __call__(self, params: Any, rest: Any, key: Any, piece: Any) -> tuple[Any, Any]:
        """``(loss, (rest, aux))``."""
        given = {} if rest is None else {"model_state": rest}
        given |= {} if key is None else {"rng": key}
        out: Any = self.function(params, piece, **given)
        parts = 1 + self.has_aux + (rest is not None)
        if parts > 1 and not (isinstance(out, tuple) and len(out) == 2):
            wanted = (
                "(model_state, aux)" if parts == 3 else "aux" if rest is None else "model_state"
            )
            raise ValueError(f"loss_fn must return (loss, {wanted}) here, got {type(out).__name__}")
        loss: Any = out[0] if parts > 1 else out
        second: Any = out[1] if parts > 1 else ()
        if jnp.shape(loss) != ():
            raise ValueError(
                "loss_fn must return a scalar, the mean over the rows of its batch, got shape "
                f"{jnp.shape(loss)}"
            )
        if rest is None:
            return loss, (None, second)
        return loss, second if self.has_aux else (second, ())

    def weigh(self, piece: Any) -> Any:
        return float(rows(piece)) if self.weight is None else wide(self.weight(piece))


class Mean(NamedTuple):
    """What a batch gives, all means over its samples."""

    loss: jax.Array
    gradient: Any  # like params, None where only the loss was wanted
    aux: Any
    rest: Any


def of_whole(loss: Loss, params: Any, rest: Any, key: Any, batch: Any, gradient: bool) -> Mean:
    """Of a batch in one piece, which may be spread over devices."""
    value, slope, aux, rest = _evaluate(loss, params, rest, key, batch, gradient)
    return Mean(wide(value), slope, aux, rest)


def of_pieces(
    loss: Loss,
    params: Any,
    rest: Any,
    key: Any,
    micro: Any,
    extra: Any,
    gradient: bool,
    axis: str | None = None,
    devices: int = 1,
) -> Mean:
    """Of micro-batches stacked along a leading axis, and of rows ``extra`` that all devices hold.

    ``axis``: the mapped axis of the devices, each with micro-batches of its own.
    """
    if axis is not None and key is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def sums(rest: Any, number: Any, piece: Any, share: float) -> Any:
        """``(weight, weighted loss, gradient and aux)`` and what is left of ``rest``."""
        own = None if key is None else jax.random.fold_in(key, number)
        value, slope, aux, rest = _evaluate(loss, params, rest, own, piece, gradient)
        weight = loss.weigh(piece) * share
        # A piece without samples has a mean of 0/0.
        weighted = lambda x: jnp.where(
            weight > 0, real_like(weight, x) * wide(x), jnp.zeros_like(wide(x))
        )
        return (wide(weight), *jax.tree.map(weighted, (value, slope, aux))), rest

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        (total, rest), (number, piece) = carry, numbered
        new, rest = sums(rest, number, piece, 1.0)
        return (jax.tree.map(jnp.add, total, new), rest), None

    total, count = None, rows(micro) if jax.tree.leaves(micro) else 0
    if count == 1:
        total, rest = sums(rest, 0, jax.tree.map(lambda x: x[0], micro), 1.0)
    elif count:
        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda: sums(rest, 0, first, 1.0)[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (total, rest), _ = jax.lax.scan(add, (zeros, rest), (jnp.arange(count), micro))
    if jax.tree.leaves(extra):
        new, rest = sums(rest, count, extra, 1.0 / devices)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    assert total is not None
    # What is no floating number in model_state, such as counts, is alike on all devices.
    averaged = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    leaves, structure = jax.tree.flatten(rest)
    moving = [
        jnp.where(total[0] > 0, real_like(total[0], x) * wide(x), 0) for x in leaves if averaged(x)
    ]
    if axis is not None:
        total, moving = jax.lax.psum((total, moving), axis)
    mean = lambda x, sum_: (sum_ / real_like(total[0], sum_)).astype(x.dtype)
    means = iter(moving)
    rest = structure.unflatten([mean(x, next(means)) if averaged(x) else x for x in leaves])
    _, value, slope, aux = jax.tree.map(lambda x: x / real_like(total[0], x), total)
    if gradient:  # as jax.grad gives it
        slope = jax.tree.map(lambda p, g: g.astype(jnp.result_type(p)), params, slope)
    return Mean(value, slope, aux, rest)


def rows(batch: Any) -> int:
    """Its number of rows; ValueError where leaves disagree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"all arrays of a batch need the same number of rows, got shapes {shapes}")
    return shapes[0][0]


def _evaluate(
    loss: Loss, params: Any, rest: Any, key: Any, piece: Any, gradient: bool
) -> tuple[Any, Any, Any, Any]:
    if not gradient:
        value, (rest, aux) = loss(params, rest, key, piece)
        return value, None, aux, rest
    (value, (rest, aux)), slope = jax.value_and_grad(loss, has_aux=True)(params, rest, key, piece)
    return value, jax.tree.map(jnp.conj, slope), aux, rest
