"""Trees matched by the paths of their leaves, since those of a state may differ from params.

Flax's variables are other nodes in an optimizer than in a model, and where a mask leaves a
parameter out of a state, a path is all that is missing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_path(tree: Any) -> dict[Any, Any]:
    """The leaves of ``tree`` by their paths."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def at_paths(function: Callable[[Any, Any], Any], params: Any, leaves: dict[Any, Any]) -> Any:
    """``params`` with ``function(p, leaf)`` at the paths of ``leaves``; the others as they are.

    Raises ValueError for a path that params do not have, or a leaf of another shape.
    """
    left = dict(leaves)

    def at(path: Any, p: Any) -> Any:
        if path not in left:
            return p
        leaf = left.pop(path)
        if jnp.shape(leaf) != jnp.shape(p):
            name = jax.tree_util.keystr(path) or "params"
            raise ValueError(
                f"opt_state does not belong to params: {name} has shape {jnp.shape(p)} in params "
                f"and {jnp.shape(leaf)} in opt_state; pass params and state of the same step"
            )
        return function(p, leaf)

    result = jax.tree_util.tree_map_with_path(at, params)
    if left:
        missing = ", ".join(jax.tree_util.keystr(path) for path in left)
        raise ValueError(
            f"opt_state does not belong to params: they have no {missing}; pass the tree that "
            "init and update were given (for flax: nnx.state(model, nnx.Param))"
        )
    return result


def only_scalar(scalar: Any) -> Any:
    """The scalar of a state, taken out of a flax variable; ValueError for a stack of them."""
    (value,) = jax.tree.leaves(scalar)
    if jnp.ndim(value):
        raise ValueError(
            f"opt_state is a stack of {jnp.shape(value)} states, as jax.vmap or replication makes "
            "them; use jax.vmap(nag_jax.eval_params)(params, opt_state)"
        )
    return value
