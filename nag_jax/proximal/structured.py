"""The proxes of penalties that couple the entries of a leaf: by order, by place, by rank."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._arithmetic import cast_like, real_like, wide
from nag_jax._types import ArrayLike, Prox, Scalar, Tree
from nag_jax.proximal._entries import Strength, check_entries, for_each_leaf
from nag_jax.proximal._segments import decreasing, taut_string


def sorted_l1(strength: Strength) -> Prox:
    r"""The prox of the sorted l1 penalty (SLOPE): the larger an entry, the larger its weight.

    With :math:`|z|_{(i)}` the i-th largest magnitude in a leaf,

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \sum_i \lambda_i |z|_{(i)}
        + \frac{1}{2 \epsilon} \|z - v\|^2

    Equal weights make it :func:`l1`. Entries of similar size are set to the same size.

    Args:
      strength: :math:`\lambda_1 \ge \lambda_2 \ge \ldots \ge 0`: an array with as many entries as
        each leaf, or a tree of these that is a prefix of params. A number is the weight of all.

    Returns:
      A prox for real leaves.

    Raises:
      ValueError: if an entry of strength is negative or not a number; from the prox, if strength
        does not have the entries of a leaf, for weights that increase, or for a complex leaf.

    Example:
      >>> prox = nag_jax.proximal.sorted_l1(jnp.array([3.0, 1.0, 0.0]))
      >>> print(prox(jnp.array([-4.0, 0.5, 3.5]), 1.0))
      [-1.75  0.5   1.75]

    References:
      Bogdan, van den Berg, Sabatti, Su, Candes, SLOPE: adaptive variable selection via convex
      optimization, 2014, arXiv:1407.3824, algorithm 3.
    """
    check_entries("strength", strength, 0.0)
    for path, weights in jax.tree_util.tree_leaves_with_path(strength):
        known = not isinstance(weights, Tracer) and jnp.ndim(weights)
        if known and bool(jnp.any(jnp.diff(jnp.ravel(weights)) > 0)):
            raise ValueError(
                f"strength{jax.tree_util.keystr(path)} must not increase, the first weight is that "
                "of the largest entry; sort it: jnp.sort(strength)[::-1]"
            )

    def of_leaf(step: Scalar, z: jax.Array, weights: ArrayLike) -> jax.Array:
        _check_real("sorted_l1", z)
        v = wide(z).ravel()
        weights = real_like(step, v) * jnp.broadcast_to(real_like(weights, v), z.shape).ravel()
        order = jnp.argsort(-jnp.abs(v), stable=True)
        sizes = jnp.maximum(decreasing(jnp.abs(v)[order] - weights), 0)
        shrunk = jnp.sign(v) * jnp.zeros_like(v).at[order].set(sizes)
        return cast_like(shrunk.reshape(z.shape), z)

    def prox(tree: Tree, step: Scalar) -> Tree:
        weights = for_each_leaf("strength", strength, tree)
        return jax.tree.map(lambda z, w: of_leaf(step, z, w), tree, weights)

    return prox


def total_variation(strength: Strength, axis: int = -1) -> Prox:
    r"""The prox of the total variation along an axis: the result is piecewise constant.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda \sum_i |z_{i+1} - z_i|
        + \frac{1}{2 \epsilon} \|z - v\|^2

    It is exact, by the taut-string algorithm, which takes steps in sequence: usually about as many
    as there are entries along the axis.

    Args:
      strength: :math:`\lambda`, at least 0: a number, or a tree of these that is a prefix of
        params.
      axis: the axis along which differences are taken.

    Returns:
      A prox for real leaves.

    Raises:
      ValueError: if strength is negative or not a number; from the prox, if strength is an array,
        for a leaf without that axis, or for a complex leaf.

    Example:
      >>> print(nag_jax.proximal.total_variation(1.0)(jnp.array([0.0, 1.0, 5.0, 6.0]), 1.0))
      [1. 1. 5. 5.]

    References:
      Condat, A direct algorithm for 1-D total variation denoising, IEEE Signal Processing Letters
      20, 2013, section 2.
    """
    check_entries("strength", strength, 0.0)

    def of_leaf(step: Scalar, z: jax.Array, weight: ArrayLike) -> jax.Array:
        _check_real("total_variation", z)
        if not -z.ndim <= axis < z.ndim or jnp.ndim(weight):
            raise ValueError(
                f"total_variation needs a number as strength and leaves with axis {axis}, got "
                f"shapes {jnp.shape(weight)} and {z.shape}"
            )
        if z.size == 0:
            return z
        rows = jnp.moveaxis(wide(z), axis, -1)
        by = real_like(step, rows) * real_like(weight, rows)
        flat = rows.reshape(-1, rows.shape[-1])
        smooth = jax.vmap(taut_string, (0, None))(flat, by).reshape(rows.shape)
        return cast_like(jnp.moveaxis(smooth, -1, axis), z)

    def prox(tree: Tree, step: Scalar) -> Tree:
        weights = for_each_leaf("strength", strength, tree)
        return jax.tree.map(lambda z, w: of_leaf(step, z, w), tree, weights)

    return prox


def nuclear(strength: Strength) -> Prox:
    r"""The prox of the nuclear norm: singular values shrink, and small ones become 0.

    With :math:`v = U \mathrm{diag}(\sigma) V^*`,

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda \|z\|_*
        + \frac{1}{2 \epsilon} \|z - v\|^2
        = U \mathrm{diag}(\max(\sigma - \epsilon \lambda, 0)) V^*

    Args:
      strength: :math:`\lambda`, at least 0: a number, or a tree of these that is a prefix of
        params.

    Returns:
      A prox for leaves with at least two dimensions. The last two are those of a matrix. Its
      derivative is that of JAX's singular value decomposition, which needs different singular
      values.

    Raises:
      ValueError: if strength is negative or not a number; from the prox, if strength is an array,
        or for a leaf with fewer than two dimensions.

    Example:
      >>> print(nag_jax.proximal.nuclear(1.0)(jnp.array([[3.0, 0.0], [0.0, 0.5]]), 1.0))
      [[2. 0.]
       [0. 0.]]

    References:
      Cai, Candes, Shen, A singular value thresholding algorithm for matrix completion, 2008,
      arXiv:0810.3286, theorem 2.1.
    """
    check_entries("strength", strength, 0.0)

    def of_leaf(step: Scalar, z: jax.Array, weight: ArrayLike) -> jax.Array:
        if z.ndim < 2 or jnp.ndim(weight):
            raise ValueError(
                "nuclear needs a number as strength and leaves with at least two dimensions, got "
                f"shapes {jnp.shape(weight)} and {z.shape}; give other leaves to optax.masked or "
                "another prox"
            )
        u, sizes, v = jnp.linalg.svd(wide(z), full_matrices=False)
        sizes = jnp.maximum(sizes - real_like(step, sizes) * real_like(weight, sizes), 0)
        return cast_like((u * sizes[..., None, :]) @ v, z)

    def prox(tree: Tree, step: Scalar) -> Tree:
        weights = for_each_leaf("strength", strength, tree)
        return jax.tree.map(lambda z, w: of_leaf(step, z, w), tree, weights)

    return prox


def _check_real(name: str, z: jax.Array) -> None:
    if jnp.iscomplexobj(z):
        raise ValueError(f"{name} needs real leaves, got one of {z.dtype}")
