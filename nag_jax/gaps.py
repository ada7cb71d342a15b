r"""Duality gaps: how far a value is above the minimum at most. For ``minimize(..., error=)``.

For a problem with the value P at x and any feasible point of its dual problem with the value D,

.. math:: P(x) - \min P \le P(x) - D,

and the right side is 0 at the solution for the best dual point. Here that point is the residual at
x, scaled or shifted until it is feasible. A gap costs about as much as a gradient. It is a
difference of two values: with float32 it cannot be measured below about 1e-7 of P.

Matrices may be NumPy or JAX arrays, or sparse (``jax.experimental.sparse.BCOO``).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from nag_jax._checks import check_range
from nag_jax._types import ArrayLike, Scalar

Gap: TypeAlias = Callable[[jax.Array], jax.Array]
Matrix: TypeAlias = Any  # what has a product and a transpose: jax.Array, np.ndarray, BCOO


def lasso(a: Matrix, b: ArrayLike, strength: ArrayLike) -> Gap:
    r"""The gap of the lasso, :math:`P(x) = \frac{1}{2} \|a x - b\|^2 + \lambda \|x\|_1`.

    Args:
      a: the matrix, shape=(rows, columns).
      b: the targets, shape=(rows,).
      strength: :math:`\lambda`, above 0: a number, or an array of shape=(columns,).

    Returns:
      A function from x, shape=(columns,), to the gap, shape=().

    Raises:
      ValueError: if strength is a number that is not positive, or shapes do not match.

    Example:
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> fun = lambda x: jnp.sum((a @ x - b) ** 2) / 2
      >>> result = nag_jax.minimize(fun, jnp.zeros(2), prox=nag_jax.proximal.l1(0.5),
      ...                           error=nag_jax.gaps.lasso(a, b, 0.5), tol=1e-5)
      >>> print(result.converged, f"{nag_jax.gaps.lasso(a, b, 0.5)(jnp.zeros(2)):.2f}")
      True 6.32

    References:
      Fercoq, Gramfort, Salmon, Mind the duality gap: safer rules for the lasso, 2015,
      arXiv:1505.03410, section 2.
    """
    return elastic_net(a, b, strength, 0.0)


def elastic_net(a: Matrix, b: ArrayLike, l1: ArrayLike, l2: Scalar) -> Gap:
    r"""The gap of the elastic net.

    .. math::
        P(x) = \frac{1}{2} \|a x - b\|^2 + \lambda_1 \|x\|_1 + \frac{\lambda_2}{2} \|x\|^2

    Args:
      a: the matrix, shape=(rows, columns).
      b: the targets, shape=(rows,).
      l1: :math:`\lambda_1`, above 0: a number, or an array of shape=(columns,).
      l2: :math:`\lambda_2`, a number of at least 0.

    Returns:
      A function from x, shape=(columns,), to the gap, shape=().

    Raises:
      ValueError: if l1 is a number that is not positive, l2 is negative, or shapes do not match.

    Example:
      >>> gap = nag_jax.gaps.elastic_net(jnp.eye(2), jnp.array([3.0, 0.5]), 1.0, l2=1.0)
      >>> print(f"{gap(jnp.array([1.0, 0.0])):.1f}", f"{gap(jnp.zeros(2)):.1f}")
      0.0 2.1

    References:
      Fercoq, Gramfort, Salmon, 2015, arXiv:1505.03410, on the lasso with rows :math:`\sqrt{l2} I`
      below a and zeros below b.
    """
    _check_strength("l1", l1)
    check_range("l2", l2, 0.0)
    _check_targets(a, b)

    def gap(x: jax.Array) -> jax.Array:
        x = _columns(a, x)
        residual = jnp.asarray(b) - a @ x
        slope = a.T @ residual - l2 * x
        squares = jnp.sum(residual**2) + l2 * jnp.sum(x**2)
        primal = squares / 2 + jnp.sum(jnp.asarray(l1) * jnp.abs(x))
        # The best feasible multiple of the residual: D = s <r, b> - s^2 |r|^2 / 2.
        along = jnp.sum(residual * jnp.asarray(b))
        best = along / jnp.where(squares > 0, squares, 1)
        largest = _feasible(slope, l1)
        s = jnp.clip(best, -largest, largest)
        return primal - (s * along - s**2 * squares / 2)

    return gap


def logistic_l1(a: Matrix, y: ArrayLike, strength: ArrayLike) -> Gap:
    r"""The gap of logistic regression with an l1 penalty.

    .. math:: P(x) = \sum_i \log(1 + e^{-y_i \langle a_i, x \rangle}) + \lambda \|x\|_1

    Args:
      a: the matrix with rows :math:`a_i`, shape=(rows, columns).
      y: the labels, -1 or 1, shape=(rows,).
      strength: :math:`\lambda`, above 0: a number, or an array of shape=(columns,).

    Returns:
      A function from x, shape=(columns,), to the gap, shape=().

    Raises:
      ValueError: if strength is a number that is not positive, or shapes do not match.

    Example:
      >>> a, y = jnp.array([[1.0, 0.5], [-1.0, 2.0], [2.0, 1.0]]), jnp.array([1.0, -1.0, 1.0])
      >>> print(f"{nag_jax.gaps.logistic_l1(a, y, 3.0)(jnp.zeros(2)):.1f}")
      0.0

    References:
      Ndiaye, Fercoq, Gramfort, Salmon, Gap safe screening rules for sparsity enforcing penalties,
      2016, arXiv:1611.05780, table 1.
    """
    _check_strength("strength", strength)
    _check_targets(a, y)

    def gap(x: jax.Array) -> jax.Array:
        x = _columns(a, x)
        margin = jnp.asarray(y) * (a @ x)
        dual = jax.nn.sigmoid(-margin)  # in units of y
        s = jnp.minimum(1.0, _feasible(a.T @ (jnp.asarray(y) * dual), strength))
        primal = jnp.sum(jnp.logaddexp(0.0, -margin)) + jnp.sum(jnp.asarray(strength) * jnp.abs(x))
        return primal - jnp.sum(_entropy(s * dual))

    return gap


def nonnegative_least_squares(a: Matrix, b: ArrayLike, interior: ArrayLike | None = None) -> Gap:
    r"""The gap of least squares with no negative entries.

    .. math:: P(x) = \frac{1}{2} \|a x - b\|^2, \qquad x \ge 0

    A dual point r is feasible if :math:`a^T r \le 0`. The residual is shifted by a multiple of a
    vector t with :math:`a^T t > 0` until it is. For a matrix without negative entries t = 1.

    Args:
      a: the matrix, shape=(rows, columns).
      b: the targets, shape=(rows,).
      interior: t, shape=(rows,); None: ones. Where :math:`a^T t > 0` does not hold for a column
        that needs it, the gap is infinite.

    Returns:
      A function from x, shape=(columns,), to the gap, shape=(). Negative entries of x count as 0.

    Raises:
      ValueError: if shapes do not match.

    Example:
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> fun = lambda x: jnp.sum((a @ x - b) ** 2) / 2
      >>> result = nag_jax.minimize(fun, jnp.zeros(2), prox=nag_jax.proximal.nonnegative(),
      ...                           error=nag_jax.gaps.nonnegative_least_squares(a, b), tol=1e-4)
      >>> print(result.converged, [f"{x:.2f}" for x in result.params])
      True ['0.00', '0.91']

    References:
      Dantas, Soubies, Fevotte, Expanding boundaries of gap safe screening, 2021, arXiv:2102.10846,
      section 4.3 (dual translation).
    """
    _check_targets(a, b)
    if interior is not None:
        _check_targets(a, interior)

    def gap(x: jax.Array) -> jax.Array:
        x = jnp.maximum(_columns(a, x), 0)
        t = jnp.ones(a.shape[0], x.dtype) if interior is None else jnp.asarray(interior)
        residual = jnp.asarray(b) - a @ x
        excess, room = jnp.maximum(a.T @ residual, 0), a.T @ t
        shifts = jnp.where(excess > 0, jnp.where(room > 0, excess / room, jnp.inf), 0)
        shift = jnp.max(shifts, initial=0)
        dual = residual - jnp.where(jnp.isfinite(shift), shift, 0) * t
        along, square = jnp.maximum(jnp.sum(dual * jnp.asarray(b)), 0), jnp.sum(dual**2)
        value = along**2 / (2 * jnp.where(square > 0, square, 1))  # of its best multiple
        value = jnp.where(jnp.isfinite(shift), value, -jnp.inf)
        return jnp.sum(residual**2) / 2 - value

    return gap


def _check_strength(name: str, strength: ArrayLike) -> None:
    if jnp.ndim(strength) == 0:
        check_range(name, strength, 0.0, low_open=True)


def _check_targets(a: Matrix, b: ArrayLike) -> None:
    shape = getattr(a, "shape", ())
    if len(shape) != 2 or jnp.shape(b) != shape[:1]:
        raise ValueError(
            "a gap needs a matrix and a vector with an entry for each of its rows, got shapes "
            f"{shape} and {jnp.shape(b)}"
        )


def _columns(a: Matrix, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != (a.shape[1],):
        raise ValueError(
            f"a gap needs params of shape ({a.shape[1]},), one entry for each column, got {x.shape}"
        )
    return x


def _feasible(slope: jax.Array, strength: ArrayLike) -> jax.Array:
    """The largest s with ``|s*slope| <= strength`` in every entry."""
    size = jnp.abs(slope)
    bounds = jnp.where(size > 0, strength / jnp.where(size > 0, size, 1), jnp.inf)
    return jnp.min(bounds, initial=jnp.finfo(bounds.dtype).max)


def _entropy(p: jax.Array) -> jax.Array:
    """``-p log p - (1 - p) log(1 - p)``, 0 at both ends."""
    return -(jax.scipy.special.xlogy(p, p) + jax.scipy.special.xlog1py(1 - p, -p))
