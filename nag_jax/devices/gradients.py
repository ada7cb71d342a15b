"""The loss and gradient of a batch in pieces: devices, micro-batches and a remainder.

A piece is some rows of the batch, and its loss is a mean over them. Loss and gradient of the pieces
are summed with their weights, over the pieces of a device by a scan and over the devices by one
all-reduce, and divided by the sum of the weights. The result is the mean over the whole batch,
however it was divided. A gradient of which each device needs only a part is summed by a
reduce-scatter instead, which sends half as much.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import real_like, wide
from nag_jax._types import ArrayLike, LossFn, Params, PyTree, Reduction, Scalar


class Loss(NamedTuple):
    """The user's loss function, called in the same way whatever it takes and returns."""

    function: LossFn
    has_aux: bool
    weight: Callable[[PyTree], ArrayLike] | None  # of a piece; None: its number of rows
    aux: Reduction = "mean"  # how the aux of pieces becomes that of the batch

    def __call__(
        self, params: Params, model_state: PyTree, key: jax.Array | None, piece: PyTree
    ) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        """Returns ``(loss, (model_state, aux))``."""
        given = {} if model_state is None else {"model_state": model_state}
        given |= {} if key is None else {"rng": key}
        out: Any = self.function(params, piece, **given)
        parts = 1 + self.has_aux + (model_state is not None)
        # Checked here: otherwise JAX reports a tracer or a tuple deep inside value_and_grad.
        if parts > 1 and not (isinstance(out, tuple) and len(out) == 2):
            wanted = (
                "(model_state, aux)"
                if parts == 3
                else "aux" if model_state is None else "model_state"
            )  # fmt: skip
            raise ValueError(f"loss_fn must return (loss, {wanted}) here, got {type(out).__name__}")
        loss, second = cast(tuple[Any, Any], out if parts > 1 else (out, ()))
        if jnp.shape(loss) != ():
            raise ValueError(
                "loss_fn must return a scalar, the mean over the rows of its batch, got shape "
                f"{jnp.shape(loss)}"
            )
        if model_state is None:
            return loss, (None, second)
        return loss, second if self.has_aux else (second, ())

    def weigh(self, piece: PyTree) -> Scalar:
        """The weight of a piece in the mean over the batch."""
        return float(rows(piece)) if self.weight is None else wide(self.weight(piece))


class Mean(NamedTuple):
    """Means over the samples of a batch."""

    loss: jax.Array
    gradient: PyTree  # like params; None if only the loss was wanted
    aux: PyTree  # or its sum, see Loss
    model_state: PyTree


class Mapped(NamedTuple):
    """The devices of a mapped axis."""

    axis: str
    devices: int
    # From the number of a leaf of the gradient to the dimension along which each device gets only
    # its part.
    scattered: Mapping[int, int]


class _Sums(NamedTuple):
    """Sums over pieces; loss and gradient are weighted, and so is aux if it is a mean."""

    weight: jax.Array
    loss: jax.Array
    gradient: PyTree
    aux: PyTree


class _SumsOf(Protocol):
    """The sums of one piece, and the model state after it."""

    def __call__(
        self, model_state: PyTree, number: ArrayLike, piece: PyTree, share: float = 1.0
    ) -> tuple[_Sums, PyTree]: ...


def of_whole(
    loss: Loss,
    params: Params,
    model_state: PyTree,
    key: jax.Array | None,
    batch: PyTree,
    gradient: bool,
) -> Mean:
    """The means over a batch in one piece, which may be split over devices."""
    value, slope, aux, model_state = _evaluate(loss, params, model_state, key, batch, gradient)
    return Mean(wide(value), slope, aux, model_state)


def of_pieces(
    loss: Loss,
    params: Params,
    model_state: PyTree,
    key: jax.Array | None,
    micro: PyTree,
    extra: PyTree,
    gradient: bool,
    mapped: Mapped | None = None,
) -> Mean:
    """The means over micro-batches, stacked along a new first axis, and rows ``extra``.

    Each of the mapped devices has different micro-batches, and all have the same ``extra``.
    """
    # Different random numbers on each device; without devices the key is that of the whole batch.
    if mapped is not None and key is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(mapped.axis))

    def sums_of(
        model_state: PyTree, number: ArrayLike, piece: PyTree, share: float = 1.0
    ) -> tuple[_Sums, PyTree]:
        piece_key = None if key is None else jax.random.fold_in(key, number)
        value, slope, aux, model_state = _evaluate(
            loss, params, model_state, piece_key, piece, gradient
        )
        weight = loss.weigh(piece) * share

        def times(factor: ArrayLike, tree: PyTree) -> PyTree:
            # The mean over a piece without samples is 0/0.
            weighted = lambda x: jnp.where(weight > 0, real_like(factor, x) * wide(x), 0)
            return jax.tree.map(weighted, tree)

        value, slope = times(weight, (value, slope))
        aux = times(share if loss.aux == "sum" else weight, aux)
        return _Sums(wide(weight), value, slope, aux), model_state

    total, model_state = _over_micro_batches(sums_of, model_state, micro)
    if jax.tree.leaves(extra):
        # All devices compute these rows, so that each contributes 1/devices of them.
        share = 1.0 / (mapped.devices if mapped else 1)
        new, model_state = sums_of(model_state, _count(micro), extra, share)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    assert total is not None  # a batch has rows
    total, model_state = _over_devices(total, model_state, mapped)
    _, value, slope, aux = jax.tree.map(lambda x: x / real_like(total.weight, x), total)
    if loss.aux == "sum":
        aux = total.aux
    # In the dtypes of params, as jax.grad returns it.
    if gradient:
        slope = jax.tree.map(lambda p, g: g.astype(jnp.result_type(p)), params, slope)
    return Mean(value, slope, aux, model_state)


def _over_micro_batches(
    sums_of: _SumsOf, model_state: PyTree, micro: PyTree
) -> tuple[_Sums | None, PyTree]:
    """The sums over the micro-batches, and the model state after the last one."""
    if not _count(micro):
        return None, model_state
    first = jax.tree.map(lambda x: x[0], micro)
    if _count(micro) == 1:  # nothing to add, so no loop and no accumulators
        return sums_of(model_state, 0, first)

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        (total, model_state), (number, piece) = carry, numbered
        new, model_state = sums_of(model_state, number, piece)
        return (jax.tree.map(jnp.add, total, new), model_state), None

    shapes = jax.eval_shape(lambda: sums_of(model_state, 0, first)[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    numbered = jnp.arange(_count(micro)), micro
    return jax.lax.scan(add, (zeros, model_state), numbered)[0]


def _over_devices(total: _Sums, model_state: PyTree, mapped: Mapped | None) -> tuple[_Sums, PyTree]:
    """The sums over devices, and the weighted mean of the model state over them."""
    # Leaves that are not floating-point, such as counts, are the same on all devices.
    is_mean = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    leaves, structure = jax.tree.flatten(model_state)
    weight = total.weight
    moving = [
        jnp.where(weight > 0, real_like(weight, x) * wide(x), 0) for x in leaves if is_mean(x)
    ]
    if mapped is not None:
        slopes, like = jax.tree.flatten(total.gradient)
        parts = {i: _part(slopes[i], d, mapped.axis) for i, d in mapped.scattered.items() if slopes}
        whole = {i: slope for i, slope in enumerate(slopes) if i not in parts}
        # One psum, so that there is one all-reduce.
        others = total._replace(gradient=whole), moving
        total, moving = jax.lax.psum(others, mapped.axis)
        summed = total.gradient | parts
        total = total._replace(gradient=like.unflatten([summed[i] for i in range(len(slopes))]))
    means = iter([x / real_like(total.weight, x) for x in moving])
    leaves = [next(means).astype(x.dtype) if is_mean(x) else x for x in leaves]
    return total, structure.unflatten(leaves)


def _part(x: jax.Array, dimension: int, axis: str) -> jax.Array:
    """This device's part along a dimension of the sum over the axis."""
    # Along the first dimension: where parts of the last one are narrower than a tile of a TPU, XLA
    # makes an all-reduce of it.
    first = jnp.moveaxis(x, dimension, 0)
    return jnp.moveaxis(jax.lax.psum_scatter(first, axis, tiled=True), 0, dimension)


def _count(micro: PyTree) -> int:
    """The number of stacked micro-batches."""
    return rows(micro) if jax.tree.leaves(micro) else 0


def rows(batch: PyTree) -> int:
    """The number of rows of a batch; ValueError if its arrays disagree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"all arrays of a batch need the same number of rows, got shapes {shapes}")
    return shapes[0][0]


def _evaluate(
    loss: Loss,
    params: Params,
    model_state: PyTree,
    key: jax.Array | None,
    piece: PyTree,
    gradient: bool,
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """The loss, gradient (None if not wanted), aux and model state of one piece."""
    if not gradient:
        value, (model_state, aux) = loss(params, model_state, key, piece)
        return value, None, aux, model_state
    (value, (model_state, aux)), slope = jax.value_and_grad(loss, has_aux=True)(
        params, model_state, key, piece
    )
    # The direction of steepest ascent of complex parameters is the conjugate of JAX's gradient.
    return value, jax.tree.map(jnp.conj, slope), aux, model_state
