"""Running an optimizer to a tolerance: ``minimize`` in one ``lax.while_loop``."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import real_like, wide
from nag_jax._checks import check_count, check_optimizer, check_prox, check_range
from nag_jax.evaluation import evaluated
from nag_jax.methods.backtracking import backtracking
from nag_jax.proximal import Prox

_PATIENCE = 10  # steps in a row that must be too small: a warm-up and a restart make single ones


class Reason(enum.IntEnum):
    """Why :func:`minimize` stopped: ``Reason(int(result.reason)).name``."""

    TOLERANCE = 0  # the error is at most tol: the only success
    MAX_STEPS = 1
    NOT_FINITE = 2  # a gradient or the next params; result.params are the last finite ones
    STEP_TOO_SMALL = 3  # params move by no more than their rounding: no progress is left


class Result(NamedTuple):
    """What :func:`minimize` returns; scalars are arrays, so that it can be jitted and vmapped."""

    params: Any  # the iterate to evaluate, like the start
    value: jax.Array  # fun(params), without a penalty, shape=()
    error: jax.Array  # the last one measured, at most tol if converged, shape=(), float32 at least
    steps: jax.Array  # gradients evaluated, shape=(), int32
    converged: jax.Array  # reason is TOLERANCE and value is finite, shape=(), bool
    reason: jax.Array  # one of Reason, shape=(), int32


class _Loop(NamedTuple):
    params: Any
    state: Any
    error: jax.Array
    steps: jax.Array
    small: jax.Array  # steps in a row that were too small
    finite: jax.Array


def minimize(
    fun: Callable[[Any], Any],
    params: Any,
    optimizer: optax.GradientTransformation | None = None,
    *,
    prox: Prox | None = None,
    tol: float = 1e-6,
    max_steps: int = 10_000,
    implicit_diff: bool = True,
) -> Result:
    r"""Minimizes ``fun``, plus the penalty or constraint of ``prox``, from ``params``.

    It stops when the error, measured where the gradient is taken, is at most ``tol``: the norm of
    the gradient, or with a prox :math:`\|p - \mathrm{prox}_1(p - \nabla f(p))\|`, which is 0
    exactly at solutions and does not depend on the learning rate. It also stops after
    ``max_steps``, when something is not finite, and when params no longer move.

    ``jax.jit``, ``jax.vmap`` and, with respect to whatever ``fun`` and ``prox`` close over,
    ``jax.grad`` and ``jax.jvp`` apply. Derivatives are those of the solution by the implicit
    function theorem, not of the steps: they need a converged result and an invertible Hessian
    (with a prox, an invertible derivative of the error's argument), and are zero with respect to
    the start. They are not checked.

    Args:
      fun: ``params -> scalar``, differentiable; data by closure.
      params: the start, any pytree. Where ``prox`` is a constraint it may violate it.
      optimizer: any ``optax.GradientTransformation``, the same prox at its head if there is one.
        ``update`` gets ``value``, ``grad`` and ``value_fn`` as line searches want them. None:
        ``nag_jax.backtracking(prox)``, FISTA with gradient restart that finds its step size, at
        the price of about one more value of fun for each gradient.
      prox: of a penalty or constraint beside fun; see ``nag_jax.proximal``.
      tol: at least 0; in units of the gradient.
      max_steps: gradients at most, at least 1.
      implicit_diff: False for a fun that JAX can differentiate only once; then no derivatives.

    Returns:
      A :class:`Result`; look at ``converged`` first.

    Raises:
      ValueError: for arguments out of range.

    The point: nothing to tune, and a report instead of a NaN.

    >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
    >>> fun = lambda p: jnp.sum((a @ p - b) ** 2) / 2
    >>> result = nag_jax.minimize(fun, jnp.zeros(2), prox=nag_jax.proximal.nonnegative(), tol=1e-4)
    >>> print(result.converged, [f"{x:.2f}" for x in result.params])
    True ['0.00', '0.91']
    >>> result = nag_jax.minimize(fun, jnp.zeros(2), nag_jax.nag(1.0))
    >>> print(result.converged, nag_jax.Reason(int(result.reason)).name)
    False NOT_FINITE

    References:
      Blondel et al., Efficient and modular implicit differentiation, 2021, arXiv:2105.15183.
    """
    check_range("tol", tol, 0.0)
    check_count("max_steps", max_steps)
    if optimizer is not None:
        check_optimizer("optimizer", optimizer)
    if prox is not None:
        check_prox(prox)
    params = jax.tree.map(jnp.asarray, params)

    def solve(fun: Callable[[Any], Any]) -> _Loop:
        tx = optimizer
        if tx is None:
            tx = backtracking(prox)
        return _run(fun, params, optax.with_extra_args_support(tx), prox, tol, max_steps)

    if implicit_diff:
        closed, data = jax.closure_convert(fun, params)
        frozen = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, data))
        end = solve(lambda p: closed(p, *frozen))
    else:
        end = solve(fun)
    end = jax.lax.stop_gradient(end)
    x = evaluated(end.params, end.state)
    if implicit_diff:
        x = _with_implicit_derivative(x, lambda p: _residual(p, _gradient(fun)(p)[1], prox), prox)
    reason = jnp.where(end.small >= _PATIENCE, Reason.STEP_TOO_SMALL, Reason.MAX_STEPS)
    reason = jnp.where(end.error <= tol, Reason.TOLERANCE, reason)
    reason = jnp.where(end.finite, reason, Reason.NOT_FINITE).astype(jnp.int32)
    value = fun(x)
    converged = (reason == Reason.TOLERANCE) & jnp.isfinite(value)
    return Result(x, value, end.error, end.steps, converged, reason)


def largest_curvature(fun: Callable[[Any], Any], params: Any, *, max_steps: int = 100) -> jax.Array:
    r"""The largest curvature of ``fun`` at ``params``, an estimate of L, by power iteration.

    Exact everywhere for quadratics. Other functions may be steeper elsewhere: take the point of
    largest curvature, such as 0 for logistic regression. A learning rate is 1/L.

    Args:
      fun: ``params -> scalar``, twice differentiable.
      params: where, any pytree of real arrays.
      max_steps: products with the Hessian at most; it stops once they change L by less than 0.1 %.

    Returns:
      The estimate plus 2 %, since the iteration comes from below; 1 where there is no curvature.
      Float ``[]``.

    Raises:
      ValueError: if max_steps is below 1.

    >>> curvature = jnp.array([3.0, 1.0, 0.1])
    >>> fun = lambda p: jnp.sum(curvature * p**2) / 2
    >>> print(f"{nag_jax.largest_curvature(fun, jnp.ones(3)):.2f}")
    3.06
    """
    check_count("max_steps", max_steps)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    start = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=False)]
    scale = lambda by, v: jax.tree.map(lambda x: (wide(x) * real_like(by, x)).astype(x.dtype), v)
    unit = lambda v, size: scale(1 / jnp.where(size > 0, size, 1), v)

    def body(carry: Any) -> Any:
        v, _, new, k = carry
        image = jax.jvp(jax.grad(fun), (params,), (unit(v, new),))[1]
        return image, new, _norm(image), k + 1

    def going(carry: Any) -> jax.Array:
        _, old, new, k = carry
        return (k < max_steps) & ((k < 2) | (jnp.abs(new - old) > 1e-3 * new))

    v = jax.tree.unflatten(structure, start)
    size = _norm(v)
    _, _, size, _ = jax.lax.while_loop(going, body, (v, size, size, 0))
    return jnp.where(size > 0, 1.02 * size, 1.0)


def _run(fun: Any, params: Any, tx: Any, prox: Any, tol: float, max_steps: int) -> _Loop:
    def going(loop: _Loop) -> jax.Array:
        stop = (loop.error <= tol) | (loop.steps >= max_steps) | (loop.small >= _PATIENCE)
        return ~stop & loop.finite

    def body(loop: _Loop) -> _Loop:
        p = loop.params
        value, g = _gradient(fun)(p)
        error = _norm(_residual(p, g, prox))
        updates, state = tx.update(g, loop.state, p, value=value, grad=g, value_fn=fun)
        new = optax.apply_updates(p, updates)
        moved = _norm(jax.tree.map(lambda a, b: wide(a) - wide(b), new, p))
        small = moved <= _rounding(p) * _norm(p)
        finite = jnp.isfinite(error) & jnp.isfinite(moved)
        keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(finite, x, y), a, b)
        return _Loop(
            params=keep(new, p),
            state=keep(state, loop.state),
            error=error,
            steps=loop.steps + 1,
            small=jnp.where(small, loop.small + 1, 0),
            finite=finite,
        )

    zero = jnp.zeros([], jnp.int32)
    infinite = jnp.full_like(_norm(params), jnp.inf)
    start = _Loop(params, tx.init(params), infinite, zero, zero, jnp.asarray(True))
    return jax.lax.while_loop(going, body, start)


def _gradient(fun: Any) -> Any:
    def value_and_gradient(params: Any) -> Any:
        value, g = jax.value_and_grad(fun)(params)
        return value, jax.tree.map(jnp.conj, g)  # optax descends along the conjugate

    return value_and_gradient


def _residual(p: Any, g: Any, prox: Any) -> Any:
    """0 exactly at a solution: the gradient, or p - prox(p - g)."""
    if prox is None:
        return g
    after = prox(jax.tree.map(lambda p, g: wide(p) - wide(g), p, g), 1.0)
    return jax.tree.map(lambda p, z: (wide(p) - wide(z)).astype(p.dtype), p, after)


def _norm(tree: Any) -> jax.Array:
    """Over all leaves, in float32 at least; scaled, so that large entries do not overflow."""
    leaves = [jnp.abs(wide(x)) for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.zeros([], float)
    largest = jnp.stack([jnp.max(x) for x in leaves]).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(sum(jnp.sum((x / scale) ** 2) for x in leaves))


def _rounding(params: Any) -> float:
    """Relative size of a step too small to matter; below float32 one that moves nothing at all."""
    eps = max((float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params)), default=0.0)
    return eps if eps < 1e-5 else 0.0


def _with_implicit_derivative(x: Any, residual: Callable[[Any], Any], prox: Any) -> Any:
    """``x``, whose derivative is that of the root of ``residual`` in what that closes over."""
    residual, data = jax.closure_convert(residual, x)
    data = jax.tree.map(jnp.asarray, data)

    @jax.custom_jvp
    def root(x: Any, data: Any) -> Any:
        del data
        return x

    @root.defjvp
    def root_jvp(primals: Any, tangents: Any) -> Any:
        (x, data), (_, moved) = primals, tangents
        change = jax.jvp(lambda data: residual(x, *data), (data,), (moved,))[1]
        jacobian = lambda v: jax.jvp(lambda p: residual(p, *data), (x,), (v,))[1]
        solved = _linear_solve(jacobian, change, symmetric=prox is None)
        return x, jax.tree.map(jnp.negative, solved)

    return root(x, data)


def _linear_solve(matrix: Any, y: Any, *, symmetric: bool) -> Any:
    """By conjugate gradients, on the normal equations where the matrix is not symmetric."""
    tol = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y)), default=1) ** 0.75
    # cg alone cannot be transposed, since its stopping threshold is computed from y.
    solve = lambda matrix, y: jax.scipy.sparse.linalg.cg(matrix, y, tol=tol)[0]
    if not symmetric:
        transpose = jax.linear_transpose(matrix, y)
        half, y = matrix, transpose(y)[0]
        matrix = lambda z: transpose(half(z))[0]
    return jax.lax.custom_linear_solve(matrix, y, solve, symmetric=True)
