"""Proximal steps: constraints and non-smooth penalties as the head of a chain. ::

    chain(prox_step(l1(0.1), learning_rate), accelerate(rules.fista(), restart=restart.gradient))

A prox is a function ``(tree, step) -> tree`` that minimizes ``penalty(z) + |z - tree|^2/(2 step)``
over z. ``params`` are the extrapolated point and in general neither sparse nor feasible; what
``eval_params`` gives is, up to the rounding of ``params - m``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import cast_like, map_gradients, proximal_step, real_like
from nag_jax._checks import check_prox, check_range, given_params

Prox = Callable[[Any, Any], Any]


class ProxStepState(NamedTuple):
    """State of :func:`prox_step` with a schedule."""

    step: jax.Array  # shape=(), int32


def prox_step(
    prox: Prox, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""The step of proximal gradient descent, :math:`u = \mathrm{prox}(p - \epsilon g) - p`.

    It takes the place of ``optax.sgd(learning_rate)``, which it is for a prox that changes
    nothing. Momentum comes after it. The learning rate is given here once; with a number the
    state is empty, so code that tunes it may call ``prox_step(prox, lr).update`` anew each step.

    Args:
      prox: ``(tree, step) -> tree`` with the shapes of params, in float32 at least; from this
        module, or any projection through :func:`projection`.
      learning_rate: :math:`\epsilon`, at least 0, or a schedule of the integer step; 1/L for the
        bounds of the rules, L the smoothness of the loss without the penalty.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``. Under
      ``inject_hyperparams`` prox is a static argument.

    Raises:
      ValueError: if learning_rate is negative, prox no function or one of ``optax.projections`` as
        it is; from update, if it is called without params.

    The lasso, and the iterate to evaluate is as sparse as the solution:

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
      problems, SIAM J. Imaging Sciences 2, 2009. Parikh, Boyd, Proximal algorithms, 2014.
    """
    check_prox(prox)
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    scheduled = callable(learning_rate)

    def init(params: optax.Params) -> Any:
        del params
        return ProxStepState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        params = given_params("prox_step", params)
        lr = learning_rate(state.step) if callable(learning_rate) else learning_rate
        steps = proximal_step(prox, updates, params, lr)
        updates = map_gradients(lambda g, u: cast_like(u, g), updates, steps)
        if scheduled:
            state = ProxStepState(jnp.asarray(optax.safe_increment(state.step)))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def l1(strength: Any) -> Prox:
    r"""The prox of :math:`\lambda \|z\|_1`: every entry shrinks by step*strength, to 0 at most.

    Args:
      strength: :math:`\lambda`, at least 0, or a tree of them that is a prefix of params, such as
        ``{"weights": 0.1, "intercept": 0.0}``. Complex entries shrink in modulus.

    Returns:
      A prox.

    Raises:
      ValueError: if strength is a negative number or none.

    >>> print(nag_jax.proximal.l1(1.0)(jnp.array([3.0, -0.5]), 0.5))
    [ 2.5 -0. ]
    """
    _check_numbers("strength", strength, 0.0)
    return elastic_net(strength, 0.0)


def elastic_net(l1: Any, l2: Any) -> Prox:
    r"""The prox of :math:`\lambda_1 \|z\|_1 + \frac{\lambda_2}{2} \|z\|^2`.

    Args:
      l1: :math:`\lambda_1`, at least 0, or a tree as in :func:`l1`.
      l2: :math:`\lambda_2`, likewise.

    Returns:
      A prox.

    Raises:
      ValueError: if one is a negative number or none.

    >>> print(nag_jax.proximal.elastic_net(1.0, l2=2.0)(jnp.array([3.0, -0.5]), 0.5))
    [ 1.25 -0.  ]
    """
    _check_numbers("l1", l1, 0.0)
    _check_numbers("l2", l2, 0.0)

    def shrink(z: jax.Array, weight: Any, ridge: Any, step: Any) -> jax.Array:
        return _shrink(z, jnp.abs(z), step * weight) / real_like(1 + step * ridge, z)

    def prox(tree: Any, step: Any) -> Any:
        return jax.tree.map(
            lambda z, a, b: shrink(z, a, b, step), tree, _spread(l1, tree), _spread(l2, tree)
        )

    return prox


def group_l1(strength: Any, axis: int | tuple[int, ...] | None = -1) -> Prox:
    r"""The prox of :math:`\lambda \sum_g \|z_g\|_2`: whole groups become 0.

    Args:
      strength: :math:`\lambda`, at least 0, or a tree as in :func:`l1`.
      axis: the axis or axes that run through one group; None: each leaf is one group. A scalar
        leaf is always one group.

    Returns:
      A prox. Its derivative at a group of zeros is 0, unless the strength is 0, too.

    Raises:
      ValueError: if strength is a negative number or none; from the prox, for a leaf without
        that axis.

    >>> print(nag_jax.proximal.group_l1(1.0)(jnp.array([[3.0, 4.0], [0.1, 0.1]]), 2.5))
    [[1.5 2. ]
     [0.  0. ]]
    """
    _check_numbers("strength", strength, 0.0)

    axes = axis if isinstance(axis, tuple) else (axis,)

    def norm(z: jax.Array) -> jax.Array:
        if z.ndim and any(a is not None and not -z.ndim <= a < z.ndim for a in axes):
            raise ValueError(
                f"group_l1 got axis={axis!r} and a leaf of shape {z.shape}, which has no such axis;"
                " give axis=None, or apply group_l1 only to leaves that have it"
            )
        return _norm(z, axis if z.ndim else None)

    def prox(tree: Any, step: Any) -> Any:
        return jax.tree.map(
            lambda z, weight: _shrink(z, norm(z), step * weight), tree, _spread(strength, tree)
        )

    return prox


def nonnegative() -> Prox:
    """The prox of the constraint z >= 0.

    Returns:
      A prox.

    >>> print(nag_jax.proximal.nonnegative()(jnp.array([3.0, -0.5]), 0.5))
    [3. 0.]
    """
    return lambda tree, step: jax.tree.map(lambda z: jnp.maximum(z, 0), tree)


def box(low: Any, high: Any) -> Prox:
    """The prox of the constraint low <= z <= high.

    Args:
      low: a number, an array, or a tree of them that is a prefix of params; may be -inf.
      high: likewise; may be inf.

    Returns:
      A prox.

    Raises:
      ValueError: if low is a number above high, or one of them is no number.

    >>> print(nag_jax.proximal.box(0.0, 1.0)(jnp.array([3.0, -0.5, 0.5]), 0.1))
    [1.  0.  0.5]
    """
    _check_numbers("low", low, -jnp.inf, high_closed=True)
    _check_numbers("high", high, -jnp.inf, high_closed=True)
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if numbers and not low <= high:
        raise ValueError(f"low must not be above high, got low={low!r}, high={high!r}")
    clip = lambda z, a, b: jnp.clip(z, real_like(a, z), real_like(b, z))
    return lambda tree, step: jax.tree.map(clip, tree, _spread(low, tree), _spread(high, tree))


def projection(project: Callable[..., Any], **arguments: Any) -> Prox:
    """Any projection as a prox: the constraint that z is where ``project`` leads.

    Args:
      project: ``tree -> tree``, such as those of ``optax.projections``.
      **arguments: of project, for example ``scale=2.0``.

    Returns:
      A prox.

    >>> prox = nag_jax.proximal.projection(optax.projections.projection_simplex)
    >>> print(prox(jnp.array([2.0, 1.5, -1.0]), 0.1))
    [0.75 0.25 0.  ]
    """
    return lambda tree, step: project(tree, **arguments)


def _shrink(z: jax.Array, size: jax.Array, by: Any) -> jax.Array:
    """z with its ``size`` reduced by ``by``, to 0 at most."""
    by, safe = real_like(by, size), jnp.where(size > 0, size, 1)
    # Where nothing is taken from nothing, the derivative is 1.
    return z * jnp.where((size > 0) | (by > 0), jnp.maximum(size - by, 0) / safe, 1)


def _norm(z: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
    """Over ``axis``, with a derivative of 0 at 0; scaled, so that no square overflows."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(z), axis=axis, keepdims=True, initial=0))
    zero = largest == 0
    scale = jnp.where(zero | ~jnp.isfinite(largest), 1, largest)
    unit = z / scale
    square = jnp.sum((unit * jnp.conj(unit)).real, axis=axis, keepdims=True)
    return jnp.where(zero, 0, scale * jnp.sqrt(jnp.where(zero, 1, square)))


def _check_numbers(name: str, tree: Any, low: float, *, high_closed: bool = False) -> None:
    """Raises ValueError for a leaf that is neither an array nor a number from ``low`` on."""
    for value in [None] if tree is None else jax.tree.leaves(tree):
        if getattr(value, "ndim", 0) == 0:
            check_range(name, value, low, high_closed=high_closed)


def _spread(prefix: Any, tree: Any) -> Any:
    return jax.tree.broadcast(prefix, tree)
