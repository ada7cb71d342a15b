r"""Proximal steps: constraints and non-smooth penalties at the head of a chain. ::

    chain(prox_step(l1(0.1), learning_rate), accelerate(rules.fista(), restart=restart.gradient))

A prox is a function ``(tree, step) -> tree``, the proximal operator of a penalty :math:`h`:

.. math:: \mathrm{prox}_\epsilon(v) = \arg\min_z h(z) + \frac{1}{2 \epsilon} \|z - v\|^2

with v the tree and :math:`\epsilon` the step. A constraint is the penalty that is 0 where it holds
and infinite elsewhere; its prox is the projection, whatever the step. ``params`` are the
extrapolated point, in general neither sparse nor feasible. The iterate of ``eval_params`` is, up to
the rounding of ``params - m``.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from nag_jax._arithmetic import cast_like, map_gradients, proximal_step, real_like, wide
from nag_jax._checks import (
    check_projection,
    check_prox,
    check_range,
    check_trainable,
    given_params,
)
from nag_jax._descent import at_count
from nag_jax._types import ArrayLike, KeyPath, PyTree, Scalar, Tree, transformation
from nag_jax._types import Prox as Prox

Strength: TypeAlias = PyTree  # numbers and arrays; a prefix of params


class ProxStepState(NamedTuple):
    """State of :func:`prox_step`."""

    step: jax.Array  # shape=(), int32


def prox_step(
    prox: Prox, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""The step of proximal gradient descent, :math:`u = \mathrm{prox}(p - \epsilon g) - p`.

    Use it instead of ``optax.sgd(learning_rate)``; with the identity as prox the two are the same.
    Momentum comes after it. The learning rate is given only here. The state is the same for a
    number and a schedule, so code that tunes the number may make a new ``prox_step(prox, lr)`` at
    each step and call its ``update``.

    Args:
      prox: ``(tree, step) -> tree``, from this module or your own. Its tree has at least float32;
        it returns the same structure and shapes. Wrap a projection in :func:`projection`, and a
        prox of jaxopt, which takes its strength before the step, as
        ``lambda x, step: jaxopt.prox.prox_lasso(x, 0.1, step)``.
      learning_rate: :math:`\epsilon`, at least 0, or a schedule of the integer step; 1/L for the
        bounds of the rules, L the smoothness of the loss without the penalty.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Under
      ``inject_hyperparams`` prox is a static argument.

    Raises:
      ValueError: if learning_rate is negative or prox does not take (tree, step); from init, for a
        parameter that is neither floating-point nor complex; from update, without params, or if
        prox returns another structure or other shapes.

    Example:
      The lasso. The iterate to evaluate is as sparse as the solution:

      >>> a = jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
      >>> b = jnp.array([2.0, -0.5, 0.1])
      >>> prox = nag_jax.proximal.l1(0.5)
      >>> optimizer = optax.chain(nag_jax.proximal.prox_step(prox, 0.3),
      ...                         nag_jax.accelerate(rules.fista()))
      >>> params = jnp.zeros(3)
      >>> state = optimizer.init(params)
      >>> for _ in range(100):
      ...     updates, state = optimizer.update(a.T @ (a @ params - b), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(jnp.round(nag_jax.eval_params(params, state), 2))
      [1.5 0.  0. ]

    References:
      Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems, SIAM J. Imaging Sciences 2, 2009. Parikh, Boyd, Proximal algorithms, Foundations
      and Trends in Optimization 1, 2014, section 4.2.
    """
    check_prox(prox)
    check_range("learning_rate", learning_rate, 0.0, schedule=True)

    def init(params: optax.Params) -> ProxStepState:
        check_trainable("a proximal step", params)
        return ProxStepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: ProxStepState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ProxStepState]:
        del extra_args
        params = given_params("prox_step", params)
        lr = at_count(learning_rate, jnp.asarray(state.step))
        steps = proximal_step(prox, updates, params, lr)
        updates = map_gradients(lambda g, u: cast_like(u, g), updates, steps)
        return updates, ProxStepState(jnp.asarray(optax.safe_increment(state.step)))

    return transformation(init, update)


def l1(strength: Strength) -> Prox:
    r"""The prox of the lasso penalty: every entry shrinks towards 0, and small ones become 0.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda \|z\|_1 + \frac{1}{2 \epsilon} \|z - v\|^2
        = \frac{v}{|v|} \max(|v| - \epsilon \lambda, 0)

    Args:
      strength: :math:`\lambda`, at least 0: a number, an array that broadcasts to each leaf, or a
        tree of these that is a prefix of params, such as ``{"weights": 0.1, "intercept": 0.0}``.

    Returns:
      A prox. It also takes complex leaves and shrinks the modulus of their entries.

    Raises:
      ValueError: if an entry of strength is negative or not a number; from the prox, if strength
        does not match its tree.

    Example:
      >>> print(nag_jax.proximal.l1(1.0)(jnp.array([3.0, -0.5]), 0.5))
      [ 2.5 -0. ]

    References:
      Parikh, Boyd, Proximal algorithms, Foundations and Trends in Optimization 1, 2014, section
      6.5.
    """
    _check_entries("strength", strength, 0.0)

    def prox(tree: Tree, step: Scalar) -> Tree:
        shrink = lambda z, weight: _shrink(z, jnp.abs(z), step * weight)
        return jax.tree.map(shrink, tree, _for_each_leaf("strength", strength, tree))

    return prox


def elastic_net(l1: Strength, l2: Strength) -> Prox:
    r"""The prox of the elastic net: every entry shrinks as in :func:`l1` and is then scaled down.

    .. math::
        \mathrm{prox}_\epsilon(v) = \arg\min_z \lambda_1 \|z\|_1
        + \frac{\lambda_2}{2} \|z\|^2 + \frac{1}{2 \epsilon} \|z - v\|^2
        = \frac{v}{|v|} \frac{\max(|v| - \epsilon \lambda_1, 0)}{1 + \epsilon \lambda_2}

    Args:
      l1: :math:`\lambda_1`, at least 0: a number, an array or a tree, as strength in :func:`l1`.
      l2: :math:`\lambda_2`, at least 0: a number, an array or a tree, as strength in :func:`l1`.

    Returns:
      A prox. It also takes complex leaves and shrinks the modulus of their entries.

    Raises:
      ValueError: if an entry of l1 or l2 is negative or not a number; from the prox, if one of
        them does not match its tree.

    Example:
      >>> print(nag_jax.proximal.elastic_net(1.0, l2=2.0)(jnp.array([3.0, -0.5]), 0.5))
      [ 1.25 -0.  ]

    References:
      Zou, Hastie, Regularization and variable selection via the elastic net, J. Royal Statistical
      Society B 67, 2005. Parikh, Boyd, Proximal algorithms, 2014, section 6.5.
    """
    _check_entries("l1", l1, 0.0)
    _check_entries("l2", l2, 0.0)

    def prox(tree: Tree, step: Scalar) -> Tree:
        def shrink(z: jax.Array, weight: ArrayLike, ridge: ArrayLike) -> jax.Array:
            shrunk = wide(_shrink(z, jnp.abs(z), step * weight))
            return cast_like(shrunk / real_like(1 + step * ridge, z), z)

        weights, ridges = _for_each_leaf("l1", l1, tree), _for_each_leaf("l2", l2, tree)
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
    _check_entries("strength", strength, 0.0)
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
        shrink = lambda z, size, weight: _shrink(z, size, step * weight)
        return jax.tree.map(shrink, tree, norms, _for_each_leaf("strength", strength, norms))

    return prox


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
    _check_entries("low", low, -np.inf, high_closed=True)
    _check_entries("high", high, -np.inf, high_closed=True)
    # Bounds of one structure are compared here, others once params are known.
    same_structure = jax.tree.structure(low) == jax.tree.structure(high)
    if same_structure:
        jax.tree_util.tree_map_with_path(_check_order, low, high)
    clip = lambda z, a, b: jnp.clip(z, real_like(a, z), real_like(b, z))

    def prox(tree: Tree, step: Scalar) -> Tree:
        del step
        lows, highs = _for_each_leaf("low", low, tree), _for_each_leaf("high", high, tree)
        if not same_structure:
            jax.tree_util.tree_map_with_path(_check_order, lows, highs)
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


def _shrink(z: jax.Array, size: jax.Array, by: ArrayLike) -> jax.Array:
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


def _check_entries(name: str, tree: PyTree, low: float, *, high_closed: bool = False) -> None:
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


def _check_order(path: KeyPath, low: ArrayLike, high: ArrayLike) -> None:
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


def _for_each_leaf(name: str, prefix: PyTree, tree: Tree) -> Tree:
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
