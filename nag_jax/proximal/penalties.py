"""The proxes of penalties on single entries and on groups of them."""

import numbers

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import cast_like, real_like, wide
from nag_jax._types import ArrayLike, Prox, Scalar, Tree
from nag_jax.proximal._entries import Strength, check_entries, for_each_leaf


def l1(strength: Strength, *, nonnegative: bool = False) -> Prox:
    r"""The prox of the lasso penalty: every entry shrinks towards 0, and small ones become 0.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda \|z\|_1 + \frac{1}{2 \epsilon} \|z - v\|^2
        = \frac{v}{|v|} \max(|v| - \epsilon \lambda, 0)

    Args:
      strength: :math:`\lambda`, at least 0: a number, an array that broadcasts to each leaf, or a
        tree of these that is a prefix of params, such as ``{"weights": 0.1, "intercept": 0.0}``.
      nonnegative: whether :math:`z \ge 0` is a constraint, too; then
        :math:`z = \max(v - \epsilon \lambda, 0)`.

    Returns:
      A prox. It also takes complex leaves and shrinks the modulus of their entries.

    Raises:
      ValueError: if an entry of strength is negative or not a number; from the prox, if strength
        does not match its tree, or for a complex leaf with ``nonnegative``.

    Example:
      >>> print(nag_jax.proximal.l1(1.0)(jnp.array([3.0, -0.5]), 0.5))
      [ 2.5 -0. ]

    References:
      Parikh, Boyd, Proximal algorithms, Foundations and Trends in Optimization 1, 2014, section
      6.5.
    """
    check_entries("strength", strength, 0.0)

    def prox(tree: Tree, step: Scalar) -> Tree:
        tree = _positive_part(tree) if nonnegative else tree
        shrink = lambda z, weight: shrunk(z, jnp.abs(z), step * weight)
        return jax.tree.map(shrink, tree, for_each_leaf("strength", strength, tree))

    return prox


def elastic_net(l1: Strength, l2: Strength, *, nonnegative: bool = False) -> Prox:
    r"""The prox of the elastic net: every entry shrinks as in :func:`l1` and is then scaled down.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda_1 \|z\|_1
        + \frac{\lambda_2}{2} \|z\|^2 + \frac{1}{2 \epsilon} \|z - v\|^2
        = \frac{v}{|v|} \frac{\max(|v| - \epsilon \lambda_1, 0)}{1 + \epsilon \lambda_2}

    Args:
      l1: :math:`\lambda_1`, at least 0: a number, an array or a tree, as strength in :func:`l1`.
      l2: :math:`\lambda_2`, at least 0: a number, an array or a tree, as strength in :func:`l1`.
      nonnegative: whether :math:`z \ge 0` is a constraint, too.

    Returns:
      A prox. It also takes complex leaves and shrinks the modulus of their entries.

    Raises:
      ValueError: if an entry of l1 or l2 is negative or not a number; from the prox, if one of
        them does not match its tree, or for a complex leaf with ``nonnegative``.

    Example:
      >>> print(nag_jax.proximal.elastic_net(1.0, l2=2.0)(jnp.array([3.0, -0.5]), 0.5))
      [ 1.25 -0.  ]

    References:
      Zou, Hastie, Regularization and variable selection via the elastic net, J. Royal Statistical
      Society B 67, 2005. Parikh, Boyd, Proximal algorithms, 2014, section 6.5.
    """
    check_entries("l1", l1, 0.0)
    check_entries("l2", l2, 0.0)

    def prox(tree: Tree, step: Scalar) -> Tree:
        def shrink(z: jax.Array, weight: ArrayLike, ridge: ArrayLike) -> jax.Array:
            small = wide(shrunk(z, jnp.abs(z), step * weight))
            return cast_like(small / real_like(1 + step * ridge, z), z)

        tree = _positive_part(tree) if nonnegative else tree
        weights, ridges = for_each_leaf("l1", l1, tree), for_each_leaf("l2", l2, tree)
        return jax.tree.map(shrink, tree, weights, ridges)

    return prox


def group_l1(strength: Strength, axis: int | tuple[int, ...] | None = -1) -> Prox:
    r"""The prox of the group lasso: whole groups shrink, and small ones become 0.

    With :math:`v_g` the entries of group g,

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda \sum_g \|z_g\|_2
        + \frac{1}{2 \epsilon} \|z - v\|^2, \qquad
        z_g = \frac{v_g}{\|v_g\|_2} \max(\|v_g\|_2 - \epsilon \lambda, 0)

    Args:
      strength: :math:`\lambda`, at least 0: a number, an array that broadcasts to the groups of
        each leaf (its shape, with 1 along axis), or a tree of these that is a prefix of params.
      axis: the axis or axes that run through one group; None: each leaf is one group. A scalar
        leaf is always one group.

    Returns:
      A prox. It also takes complex leaves and shrinks the norm of their groups. Its derivative at a
      group of zeros is 0, unless the strength is 0, too.

    Raises:
      ValueError: if an entry of strength is negative or not a number; from the prox, if strength
        does not match its tree, or for a leaf without that axis.

    Example:
      >>> print(nag_jax.proximal.group_l1(1.0)(jnp.array([[3.0, 4.0], [0.1, 0.1]]), 2.5))
      [[1.5 2. ]
       [0.  0. ]]

    References:
      Yuan, Lin, Model selection and estimation in regression with grouped variables, J. Royal
      Statistical Society B 68, 2006. Parikh, Boyd, Proximal algorithms, 2014, section 6.5.
    """
    check_entries("strength", strength, 0.0)
    axes = axis if isinstance(axis, tuple) else (axis,)
    integral = all(isinstance(a, numbers.Integral) and not isinstance(a, bool) for a in axes)
    if axis is not None and not (integral and len(set(axes)) == len(axes)):
        raise ValueError(
            f"axis must be an int, a tuple of different ints or None, got {axis!r}; None makes "
            "each leaf one group"
        )

    def norm(z: jax.Array) -> jax.Array:
        if z.ndim and any(a is not None and not -z.ndim <= a < z.ndim for a in axes):
            raise ValueError(
                f"group_l1 got axis={axis!r} and a leaf of shape {z.shape}, which has no such axis;"
                " give axis=None, or apply group_l1 only to leaves that have it"
            )
        return _norm(z, axis if z.ndim else None)

    def prox(tree: Tree, step: Scalar) -> Tree:
        norms = jax.tree.map(norm, tree)
        shrink = lambda z, size, weight: shrunk(z, size, step * weight)
        return jax.tree.map(shrink, tree, norms, for_each_leaf("strength", strength, norms))

    return prox


def _positive_part(tree: Tree) -> Tree:
    def part(z: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(z):
            raise ValueError(f"nonnegative needs real leaves, got one of {z.dtype}")
        return jnp.maximum(z, 0)

    return jax.tree.map(part, tree)


def shrunk(z: jax.Array, size: jax.Array, by: ArrayLike) -> jax.Array:
    """``z`` with its ``size`` reduced by ``by``, but not below 0."""
    size, by = wide(size), real_like(by, size)
    safe = jnp.where(size > 0, size, 1)
    # Where both are 0, z is unchanged and the derivative is 1.
    share = jnp.where((size > 0) | (by > 0), jnp.maximum(size - by, 0) / safe, 1)
    return cast_like(real_like(share, z) * wide(z), z)


def _norm(z: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
    """Over ``axis``, with a derivative of 0 at 0; scaled, so that no square overflows."""
    z = wide(z)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(z), axis=axis, keepdims=True, initial=0))
    zero = largest == 0
    scale = jnp.where(zero | ~jnp.isfinite(largest), 1, largest)
    unit = z / real_like(scale, z)
    square = jnp.sum((unit * jnp.conj(unit)).real, axis=axis, keepdims=True)
    return jnp.where(zero, 0, scale * jnp.sqrt(jnp.where(zero, 1, square)))
