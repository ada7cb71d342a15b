"""Matching trees by the paths of their leaves.

An optimizer's state is like params in the paths of its leaves, but not always in structure:
Flax's variables are other nodes in an optimizer than in a model, and a mask removes leaves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nag_jax._types import KeyPath, PyTree, Tree


def by_path(tree: PyTree) -> dict[KeyPath, jax.Array]:
    """The leaves of ``tree`` by their paths."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def at_paths(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    params: Tree,
    leaves: dict[KeyPath, jax.Array],
) -> Tree:
    """``params`` with ``function(p, leaf)`` at the paths of ``leaves``; other leaves unchanged.

    Raises ValueError for a path that params do not have, or a leaf of another shape.
    """
    unmatched = dict(leaves)

    def at(path: KeyPath, p: jax.Array) -> jax.Array:
        if path not in unmatched:
            return p
        leaf = unmatched.pop(path)
        # Broadcasting would hide that params are not those of the state.
        if jnp.shape(leaf) != jnp.shape(p):
            name = jax.tree_util.keystr(path) or "params"
            raise ValueError(
                f"opt_state does not belong to params: {name} has shape {jnp.shape(p)} in params "
                f"and {jnp.shape(leaf)} in opt_state; pass params and state of the same step"
            )
        return function(p, leaf)

    result = jax.tree_util.tree_map_with_path(at, params)
    if unmatched:
        missing = ", ".join(jax.tree_util.keystr(path) for path in unmatched)
        raise ValueError(
            f"opt_state does not belong to params: they have no {missing}; pass the tree that "
            "init and update were given (for flax: nnx.state(model, nnx.Param))"
        )
    return result


def only_scalar(scalar: PyTree) -> jax.Array:
    """The scalar of a state, which may be in a flax variable; ValueError for a stack of them."""
    (value,) = jax.tree.leaves(scalar)
    if jnp.ndim(value):
        raise ValueError(
            f"opt_state is a stack of {jnp.shape(value)} states, as jax.vmap or replication makes "
            "them; use jax.vmap(nag_jax.eval_params)(params, opt_state)"
        )
    return value
