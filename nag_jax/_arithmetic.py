"""Arithmetic in at least float32, on trees in which leaves may have no gradient (None)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax._checks import check_trainable, is_array
from nag_jax._types import (
    ArrayLike,
    AxisName,
    DTypeLike,
    Leaf,
    Params,
    Prox,
    PyTree,
    Scalar,
    Tree,
    Updates,
)


def dtype_of(p: Leaf) -> np.dtype:
    """The dtype of an array, an abstract array or a Python number."""
    own = getattr(p, "dtype", None)
    return jnp.result_type(p) if own is None else own


def widened(dtype: DTypeLike) -> np.dtype:
    """``dtype``, or float32 if it is narrower than that or an integer."""
    # Not jnp.promote_types, which raises under jax_numpy_dtype_promotion="strict".
    dtype = jnp.dtype(dtype)
    kept = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if kept else np.dtype(np.float32)


def wide(x: ArrayLike) -> jax.Array:
    """``x`` in at least float32, or complex64 if it is complex."""
    x = jnp.asarray(x)
    return x.astype(widened(x.dtype))


def cast_like(x: jax.Array, other: ArrayLike) -> jax.Array:
    """``x`` in the dtype of ``other``."""
    return x.astype(dtype_of(other))


def wide_zeros(params: Params) -> Params:
    """Zeros like ``params`` in at least float32; ValueError for a leaf that cannot be trained."""
    check_trainable("momentum", params)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=widened(dtype_of(p))), params)


def real_like(scalar: ArrayLike, like: ArrayLike) -> jax.Array:
    """``scalar`` in the dtype of ``wide(like)``, to be multiplied by it."""
    return jnp.asarray(scalar, widened(dtype_of(like)))


def mix(a: Scalar, x: ArrayLike, b: Scalar, y: ArrayLike) -> jax.Array:
    """``a*x + b*y`` in at least float32."""
    dtype = np.promote_types(widened(dtype_of(x)), widened(dtype_of(y)))
    a, b = (float(c) if isinstance(c, int | float) else jnp.asarray(c, dtype) for c in (a, b))
    return a * jnp.asarray(x, dtype) + b * jnp.asarray(y, dtype)


def as_arrays(state: Tree) -> Tree:
    """``state`` with its leaves as JAX arrays: NumPy scalars would be rounded differently."""
    return jax.tree.map(jnp.asarray, state)


def cast_tree(tree: Tree, like: Tree) -> Tree:
    """``tree`` in the dtypes of ``like``, whatever ``jax_enable_x64`` was when that was made."""
    return jax.tree.map(lambda x, old: jnp.asarray(x, dtype_of(old)), tree, like)


def ratio(a: ArrayLike, b: jax.Array) -> jax.Array:
    """a/b, and 0 where b is 0, without a NaN in between or in the derivative."""
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: PyTree, tangents: PyTree) -> tuple[jax.Array, jax.Array]:
    # Not root itself: JAX before 0.12 drops its rule in forward over reverse mode through a scan.
    zero = primals[0] == 0
    y = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, primals[0])))
    return y, ratio(tangents[0], 2 * y)


def buffer_dtype(own: DTypeLike, wanted: DTypeLike) -> np.dtype:
    """``wanted`` for a leaf of dtype ``own``: complex for a complex leaf, otherwise real.

    A complex buffer has at least the precision of complex64.
    """
    wanted = jnp.dtype(wanted)
    if jnp.issubdtype(own, jnp.complexfloating):
        # JAX has no complex dtype of half precision.
        wide = jnp.issubdtype(wanted, jnp.inexact) and wanted.itemsize >= 4
        return np.promote_types(wanted if wide else np.float32, np.complex64)
    is_complex = jnp.issubdtype(wanted, jnp.complexfloating)
    return jnp.finfo(wanted).dtype if is_complex else wanted


def varying_axes(x: ArrayLike) -> frozenset[AxisName]:
    """The axes of a checked ``shard_map`` over which ``x`` may differ; empty outside of one."""
    aval = jax.typeof(x)
    # jax 0.7 has the first attribute, jax 0.10 the second.
    axes = getattr(aval, "vma", None) or getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(axes, "varying", axes) or ())


def map_gradients(function: Callable[..., ArrayLike], *trees: PyTree) -> PyTree:
    """``jax.tree.map`` that keeps a None of the first tree, whatever the others have there."""
    return jax.tree.map(
        lambda g, *leaves: None if g is None else function(g, *leaves),
        *trees,
        is_leaf=lambda node: node is None,
    )


def filled(tree: PyTree, default: Tree) -> Tree:
    """``tree`` with its Nones replaced by the leaves of ``default``."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        tree,
        default,
        is_leaf=lambda node: node is None,
    )


def copied(params: Params, dtype: DTypeLike | None = None) -> Params:
    """A copy of ``params``, which can be donated together with them; abstract for abstract leaves.

    It has the dtype of each parameter, or ``dtype`` as :func:`buffer_dtype` reads it.
    """

    def copy(p: Leaf) -> Leaf:
        own = dtype_of(p) if dtype is None else buffer_dtype(dtype_of(p), dtype)
        if isinstance(p, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(p.shape, own, sharding=p.sharding)
        return jnp.array(p, own, copy=True)

    return jax.tree.map(copy, params)


def trained(params: PyTree, buffer: Tree) -> Tree:
    """``params`` with None where ``buffer`` has it.

    The state of an Equinox model is made from its arrays, but ``update`` may be given the whole
    model, including its functions.
    """
    return map_gradients(lambda _, p: p, buffer, params)


def apply_prox(prox: Prox, tree: Tree, step: Scalar) -> Tree:
    """``prox(tree, step)``; ValueError unless it has the structure and shapes of ``tree``."""
    after = prox(tree, step)
    try:
        same_shape = lambda z, new: is_array(new) and jnp.shape(z) == jnp.shape(new)
        same = jax.tree.map(same_shape, tree, after)
    except ValueError:  # the structures differ
        same = False
    if not jax.tree.all(same):
        raise ValueError(
            "prox must return a tree with the structure and shapes of its first argument, got "
            f"{_described(after)} for {_described(tree)}; a penalty's prox returns the minimizer, "
            "not the value"
        )
    return after


def proximal_step(prox: Prox, g: Updates, params: Params, lr: Scalar) -> Updates:
    """``prox(params - lr*g, lr) - params`` in at least float32."""
    point = map_gradients(lambda g, p: wide(p) - real_like(lr, p) * wide(g), g, params)
    after = apply_prox(prox, point, lr)
    return map_gradients(lambda g, p, z: wide(z) - wide(p), g, params, after)


def _described(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: getattr(x, "shape", x), tree))


def applied(u: ArrayLike, p: ArrayLike) -> jax.Array:
    """The distance by which ``optax.apply_updates`` moves ``p``, in at least float32."""
    after = wide(p) + wide(u)
    if dtype_of(p).itemsize < 4:
        # Not a cast to the dtype of p and back, which XLA may remove.
        kind = jnp.finfo(dtype_of(p))
        after = jax.lax.reduce_precision(after, kind.nexp, kind.nmant)
    # Also for float32 not ``u``: XLA on TPU would not make params and what follows in one pass.
    return after - wide(p)
