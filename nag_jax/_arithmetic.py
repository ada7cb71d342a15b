"""Arithmetic in float32 at least, over trees in which a leaf may have no gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax._checks import check_trainable, is_array


def dtype_of(p: Any) -> Any:
    """Of an array, an abstract one or a Python number."""
    return p.dtype if hasattr(p, "dtype") else jnp.result_type(p)


def widened(dtype: Any) -> np.dtype:
    """``dtype``, but float32 where it is narrower than that or an integer."""
    # Not jnp.promote_types, which raises under jax_numpy_dtype_promotion="strict".
    dtype = jnp.dtype(dtype)
    kept = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if kept else np.dtype(np.float32)


def wide(x: Any) -> jax.Array:
    """``x`` in float32 at least; complex64 at least where it is complex."""
    x = jnp.asarray(x)
    return x.astype(widened(x.dtype))


def cast_like(x: jax.Array, other: Any) -> jax.Array:
    """``x`` in the dtype of ``other``, an array or a Python number."""
    return x.astype(dtype_of(other))


def wide_zeros(params: Any) -> Any:
    """Zeros like ``params``, in float32 at least; ValueError for a leaf that cannot be trained."""
    check_trainable("momentum", params)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=widened(dtype_of(p))), params)


def real_like(scalar: Any, like: Any) -> jax.Array:
    """``scalar`` in the dtype of ``wide(like)``, to be multiplied by it."""
    return jnp.asarray(scalar, widened(dtype_of(like)))


def mix(a: Any, x: Any, b: Any, y: Any) -> jax.Array:
    """``a*x + b*y`` in float32 at least."""
    dtype = np.promote_types(widened(dtype_of(x)), widened(dtype_of(y)))
    a, b = (float(c) if isinstance(c, int | float) else jnp.asarray(c, dtype) for c in (a, b))
    return a * jnp.asarray(x, dtype) + b * jnp.asarray(y, dtype)


def as_arrays(state: Any) -> Any:
    """``state`` with its leaves as JAX arrays: NumPy scalars would be rounded differently."""
    return jax.tree.map(jnp.asarray, state)


def cast_tree(tree: Any, like: Any) -> Any:
    """``tree`` in the dtypes of ``like``, whatever ``jax_enable_x64`` was when that was made."""
    return jax.tree.map(lambda x, old: jnp.asarray(x, dtype_of(old)), tree, like)


def ratio(a: Any, b: jax.Array) -> jax.Array:
    """a/b, and 0 where b is 0, with no NaN on the way there or in the derivative."""
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Not root itself: forward over reverse mode through a scan, JAX before 0.12 forgets its rule.
    zero = primals[0] == 0
    y = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, primals[0])))
    return y, ratio(tangents[0], 2 * y)


def buffer_dtype(own: Any, wanted: Any) -> np.dtype:
    """``wanted`` for a leaf of dtype ``own``: complex for a complex leaf, else real.

    A complex buffer has at least the precision of complex64.
    """
    wanted = jnp.dtype(wanted)
    if jnp.issubdtype(own, jnp.complexfloating):
        wide = jnp.issubdtype(wanted, jnp.inexact) and wanted.itemsize >= 4
        return np.promote_types(wanted if wide else np.float32, np.complex64)
    is_complex = jnp.issubdtype(wanted, jnp.complexfloating)
    return jnp.finfo(wanted).dtype if is_complex else wanted


def varying_axes(x: Any) -> frozenset[Any]:
    """The axes of a checked ``shard_map`` over which ``x`` may differ; empty outside of one."""
    aval = jax.typeof(x)
    # jax 0.7 says it in the first attribute, 0.10 in the second.
    axes = getattr(aval, "vma", None) or getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(axes, "varying", axes) or ())


def map_gradients(function: Callable[..., Any], *trees: Any) -> Any:
    """``jax.tree.map`` that keeps a None of the first tree, whatever the others hold there."""
    return jax.tree.map(
        lambda g, *rest: None if g is None else function(g, *rest),
        *trees,
        is_leaf=lambda node: node is None,
    )


def filled(tree: Any, default: Any) -> Any:
    """``tree`` with the leaf of ``default`` where it has None, as :func:`map_gradients` leaves."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        tree,
        default,
        is_leaf=lambda node: node is None,
    )


def trained(params: Any, buffer: Any) -> Any:
    """``params`` with None where ``buffer`` has it.

    The state of an Equinox model is made from its arrays, but ``update`` may be given the whole
    model, with its functions.
    """
    return map_gradients(lambda _, p: p, buffer, params)


def apply_prox(prox: Callable[[Any, Any], Any], tree: Any, step: Any) -> Any:
    """``prox(tree, step)``; ValueError unless that has the structure and shapes of ``tree``."""
    after = prox(tree, step)
    try:
        alike = lambda z, new: is_array(new) and jnp.shape(z) == jnp.shape(new)
        same = jax.tree.map(alike, tree, after)
    except ValueError:  # another structure
        same = False
    if not jax.tree.all(same):
        raise ValueError(
            "prox must return a tree with the structure and shapes of its first argument, got "
            f"{_described(after)} for {_described(tree)}; a penalty's prox returns the minimizer, "
            "not the value"
        )
    return after


def proximal_step(prox: Callable[[Any, Any], Any], g: Any, params: Any, lr: Any) -> Any:
    """prox(params - lr*g) - params, in float32 at least."""
    point = map_gradients(lambda g, p: wide(p) - real_like(lr, p) * wide(g), g, params)
    after = apply_prox(prox, point, lr)
    return map_gradients(lambda g, p, z: wide(z) - wide(p), g, params, after)


def _described(tree: Any) -> str:
    return str(jax.tree.map(lambda x: getattr(x, "shape", x), tree))


def applied(u: jax.Array, p: jax.Array) -> jax.Array:
    """By how much ``optax.apply_updates`` moves ``p``, in float32 at least."""
    if dtype_of(p).itemsize >= 4:
        return wide(u)
    kind = jnp.finfo(dtype_of(p))  # XLA would leave out a cast there and back
    return jax.lax.reduce_precision(wide(p) + wide(u), kind.nexp, kind.nmant) - wide(p)
