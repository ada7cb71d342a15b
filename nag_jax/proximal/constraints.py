"""The proxes of constraints: projections."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax._arithmetic import real_like
from nag_jax._checks import check_projection
from nag_jax._types import Prox, PyTree, Scalar, Tree
from nag_jax.proximal._entries import Strength, check_entries, check_order, for_each_leaf


def nonnegative() -> Prox:
    r"""The prox of the constraint that no entry is negative.

    .. math:: \mathrm{prox}_\epsilon(v) = \arg\min_{z \ge 0} \|z - v\|^2 = \max(v, 0)

    Returns:
      A prox, for real leaves.

    Example:
      >>> print(nag_jax.proximal.nonnegative()(jnp.array([3.0, -0.5]), 0.5))
      [3. 0.]

    References:
      Parikh, Boyd, Proximal algorithms, 2014, section 6.2.
    """
    return lambda tree, step: jax.tree.map(lambda z: jnp.maximum(z, 0), tree)


def box(low: Strength, high: Strength) -> Prox:
    r"""The prox of the constraint that every entry is between two bounds.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_{l \le z \le h} \|z - v\|^2
        = \min(\max(v, l), h)

    Args:
      low: l: a number, an array that broadcasts to each leaf, or a tree of these that is a prefix
        of params; may be -inf.
      high: h, not below low: a number, an array or a tree like low; may be inf.

    Returns:
      A prox, for real leaves.

    Raises:
      ValueError: if an entry of low or high is not a number or low is above high; from the prox, if
        one of them does not match its tree.

    Example:
      >>> print(nag_jax.proximal.box(0.0, 1.0)(jnp.array([3.0, -0.5, 0.5]), 0.1))
      [1.  0.  0.5]

    References:
      Parikh, Boyd, Proximal algorithms, 2014, section 6.2.
    """
    check_entries("low", low, -np.inf, high_closed=True)
    check_entries("high", high, -np.inf, high_closed=True)
    # Bounds of one structure are compared here, others once params are known.
    same_structure = jax.tree.structure(low) == jax.tree.structure(high)
    if same_structure:
        jax.tree_util.tree_map_with_path(check_order, low, high)
    clip = lambda z, a, b: jnp.clip(z, real_like(a, z), real_like(b, z))

    def prox(tree: Tree, step: Scalar) -> Tree:
        del step
        lows, highs = for_each_leaf("low", low, tree), for_each_leaf("high", high, tree)
        if not same_structure:
            jax.tree_util.tree_map_with_path(check_order, lows, highs)
        return jax.tree.map(clip, tree, lows, highs)

    return prox


def projection(project: Callable[..., PyTree], **arguments: object) -> Prox:
    r"""The prox of a constraint, made from the projection onto it.

    .. math:: \mathrm{prox}_\epsilon(v) = \arg\min_{z \in C} \|z - v\|^2

    Args:
      project: ``tree -> tree``, the projection onto C, such as those of ``optax.projections``.
      **arguments: passed on to project by name, such as ``scale=2.0``.

    Returns:
      A prox.

    Raises:
      ValueError: if project is not a function that takes a tree and these arguments.

    Example:
      >>> prox = nag_jax.proximal.projection(optax.projections.projection_simplex)
      >>> print(prox(jnp.array([2.0, 1.5, -1.0]), 0.1))
      [0.75 0.25 0.  ]

    References:
      Parikh, Boyd, Proximal algorithms, 2014, section 1.2.
    """
    check_projection(project, arguments)
    return lambda tree, step: project(tree, **arguments)
