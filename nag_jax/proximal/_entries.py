"""Strengths and bounds: numbers, arrays or trees of them, with an entry for each leaf."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nag_jax._checks import check_range
from nag_jax._types import ArrayLike, KeyPath, PyTree, Tree

Strength: TypeAlias = PyTree  # numbers and arrays; a prefix of params


def check_entries(name: str, tree: PyTree, low: float, *, high_closed: bool = False) -> None:
    """Raises ValueError for a leaf that is not a number of at least ``low`` or an array of them."""
    # To JAX None is a tree without leaves, so the loop would accept it.
    if tree is None:
        check_range(name, None, low, high_closed=high_closed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = name + jax.tree_util.keystr(path)
        if not getattr(leaf, "ndim", 0):
            check_range(where, leaf, low, high_closed=high_closed)
            continue
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer)):
            raise ValueError(f"{where} must hold real numbers, got an array of {leaf.dtype}")
        array = _known(leaf)
        if array is not None:
            inside = (array >= low) & ((array < np.inf) | high_closed)
            for wrong in array[~inside][:1]:
                check_range(where, wrong, low, high_closed=high_closed)


def check_order(path: KeyPath, low: ArrayLike, high: ArrayLike) -> None:
    """Raises ValueError where ``low`` is above ``high``, if both are known."""
    a, b = _known(low), _known(high)
    if a is None or b is None:
        return
    try:
        wrong = np.asarray(a > b)
    except ValueError:  # the shapes differ; the prox raises a ValueError that names the parameter
        return
    if np.any(wrong):
        a, b = (float(np.broadcast_to(x, wrong.shape)[wrong][0]) for x in (a, b))
        where = jax.tree_util.keystr(path)
        raise ValueError(f"low{where} must not be above high{where}, got low={a}, high={b}")


def _known(leaf: ArrayLike) -> Any:
    """The number or NumPy array; None if it is traced or other processes hold some of it."""
    if isinstance(leaf, Tracer) or not getattr(leaf, "is_fully_addressable", True):
        return None
    return np.asarray(leaf) if hasattr(leaf, "dtype") else leaf


def for_each_leaf(name: str, prefix: PyTree, tree: Tree) -> Tree:
    """``prefix`` with an entry for each leaf of ``tree``; ValueError if they do not match."""
    try:
        entries = jax.tree.broadcast(prefix, tree)
    except ValueError:
        raise ValueError(
            f"{name} must be a number, an array or a tree that is a prefix of params, got "
            f"{jax.tree.structure(prefix)} for {jax.tree.structure(tree)}; give each parameter its "
            "entry, and numbers of one array as an array, not a list"
        ) from None

    def check(path: KeyPath, entry: ArrayLike, z: ArrayLike) -> None:
        given, allowed = jnp.shape(entry), jnp.shape(z)
        # The entry must broadcast to the leaf: in the other direction the leaf would grow.
        try:
            fits = np.broadcast_shapes(given, allowed) == allowed
        except ValueError:
            fits = False
        if not fits:
            where = f" of parameter {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"{name}{where} must be a number or an array that broadcasts to {allowed}, got "
                f"shape {given}; reshape it"
            )

    jax.tree_util.tree_map_with_path(check, entries, tree)
    return entries
