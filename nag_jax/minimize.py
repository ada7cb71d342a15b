"""Running an optimizer to a tolerance: ``minimize`` in one ``lax.while_loop``."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import real_like, wide
from nag_jax._checks import check_count, check_optimizer, check_prox, check_range, given_scalar
from nag_jax._compiled import compiled
from nag_jax._implicit import hoisted, norm, with_derivatives
from nag_jax.evaluation import evaluated
from nag_jax.methods.backtracking import backtracking
from nag_jax.proximal import Prox

_PATIENCE = 10  # steps in a row that must be too small: a warm-up and a restart make single ones
_ROUNDING = 8  # of an iterate, in units of the precision of params
_MOST_STEPS = 2**31 - 1  # counted in int32


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
    sizes: Any  # with a prox: the largest that params were lately; their sums round by that


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
    if not isinstance(max_steps, jax.Array):
        max_steps = min(max_steps, _MOST_STEPS)
    # Arrays, so that one compiled program does for all values.
    limits = jnp.asarray(tol, float), jnp.asarray(max_steps, jnp.int32)

    def solved(params: Any) -> Result:
        value = _scalar(fun)
        run = lambda params: _run(value, params, optimizer, prox, *limits)
        # The steps are not differentiated, whatever takes part in them.
        run, data = hoisted(run, params)
        x, error, steps, reason = run(*jax.lax.stop_gradient((data, params)))
        if implicit_diff:
            exists = reason != Reason.NOT_FINITE
            x = with_derivatives(x, lambda p: _gradient(value)(p)[1], prox, exists)
        y = value(x)
        converged = (reason == Reason.TOLERANCE) & jnp.isfinite(y) & jnp.isfinite(norm(x))
        return Result(x, y, error, steps, converged, reason)

    params = _floating(params)
    rules = prox is not None and "custom_" in str(jax.make_jaxpr(prox)(params, 1.0))
    return compiled(solved, params, owner=fun, parts=(optimizer, prox), opaque=rules)


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
    curvature = lambda params: _power_iteration(_scalar(fun), params, max_steps)
    return compiled(curvature, _floating(params), owner=fun, parts=None, opaque=False)


def _power_iteration(fun: Any, params: Any, max_steps: int) -> jax.Array:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    start = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=False)]
    scale = lambda by, v: jax.tree.map(lambda x: (wide(x) * real_like(by, x)).astype(x.dtype), v)
    unit = lambda v, size: scale(1 / jnp.where(size > 0, size, 1), v)

    def body(carry: Any) -> Any:
        v, _, new, k = carry
        image = jax.jvp(jax.grad(fun), (params,), (unit(v, new),))[1]
        return image, new, norm(image), k + 1

    def going(carry: Any) -> jax.Array:
        _, old, new, k = carry
        return (k < max_steps) & ((k < 2) | (jnp.abs(new - old) > 1e-3 * new))

    v = jax.tree.unflatten(structure, start)
    size = norm(v)
    _, _, size, _ = jax.lax.while_loop(going, body, (v, size, size, 0))
    return jnp.where(size > 0, 1.02 * size, 1.0)


def _run(
    fun: Any, params: Any, optimizer: Any, prox: Any, tol: jax.Array, max_steps: jax.Array
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """The params found, error, steps, reason."""
    tx = optax.with_extra_args_support(backtracking(prox) if optimizer is None else optimizer)
    tol = tol.astype(norm(params).dtype)

    def going(loop: _Loop) -> jax.Array:
        stop = (loop.error <= tol) | (loop.steps >= max_steps) | (loop.small >= _PATIENCE)
        return ~stop & loop.finite

    def body(loop: _Loop) -> _Loop:
        p = loop.params
        value, g = _gradient(fun)(p)
        error = _error(p, g, prox)
        updates, state = tx.update(g, loop.state, p, value=value, grad=g, value_fn=fun)
        new = optax.apply_updates(p, updates)
        moved = norm(_minus(new, p))
        small = moved <= _rounding(p) * norm(p)
        finite = jnp.isfinite(error) & (moved < _limit(moved))
        finite = finite & (jnp.isfinite(value) | (error <= tol))
        keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(finite, x, y), a, b)
        new, state, sizes = keep(new, p), keep(state, loop.state), loop.sizes
        if prox is not None:
            sizes = jax.tree.map(lambda size, p: jnp.maximum(jnp.abs(p), size / 2), sizes, new)
        return _Loop(
            params=new,
            state=state,
            error=error.astype(loop.error.dtype),  # a projection may have widened it
            steps=loop.steps + 1,
            small=jnp.where(small, loop.small + 1, 0),
            finite=finite,
            sizes=sizes,
        )

    zero = jnp.zeros([], jnp.int32)
    infinite = jnp.full_like(norm(params), jnp.inf)
    sizes = () if prox is None else jax.tree.map(jnp.abs, params)
    loop = _Loop(params, tx.init(params), infinite, zero, zero, jnp.asarray(True), sizes)
    loop = jax.lax.while_loop(going, body, loop)
    x, met = evaluated(loop.params, loop.state), loop.error <= tol
    small = loop.small >= _PATIENCE
    if prox is not None:
        x = _settled(x, loop.sizes, prox)
        hidden = met & _hidden(x, fun, prox, tol)
        met, small = met & ~hidden, small | hidden
    reason = jnp.where(small, Reason.STEP_TOO_SMALL, Reason.MAX_STEPS)
    reason = jnp.where(met, Reason.TOLERANCE, reason)
    reason = jnp.where(loop.finite, reason, Reason.NOT_FINITE).astype(jnp.int32)
    return x, loop.error, loop.steps, reason


def _settled(x: Any, sizes: Any, prox: Prox) -> Any:
    """``x``, a sum of params and a buffer, sparse and feasible in spite of their rounding."""

    def cleared(x: jax.Array, size: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(x) <= _ROUNDING * float(jnp.finfo(x.dtype).eps) * size, 0, x)

    return _projected(jax.tree.map(cleared, x, sizes), prox)


def _projected(x: Any, prox: Prox) -> Any:
    """The prox with a step as good as 0: it projects, and a penalty changes nothing."""
    step = jnp.full_like(norm(x), jnp.finfo(norm(x).dtype).tiny)
    z = prox(jax.tree.map(wide, x), step)
    return jax.tree.map(lambda x, z: z.astype(x.dtype), x, z)


def _scalar(fun: Callable[[Any], Any]) -> Callable[[Any], jax.Array]:
    """``fun``; ValueError where it does not return one real floating number."""

    def value(params: Any) -> jax.Array:
        y = given_scalar("what fun returns", fun(params))
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(f"what fun returns must be a floating number, got {y.dtype}[]")
        return y

    return value


def _floating(params: Any) -> Any:
    """``params`` as arrays; ValueError unless they are floating or complex, or Python numbers."""

    def leaf(path: Any, p: Any) -> jax.Array:
        try:
            number = isinstance(p, int | float) and not isinstance(p, bool)
            x = jnp.asarray(p, float) if number else jnp.asarray(p)
            got = f"{x.dtype}{list(x.shape)}"
        except (TypeError, ValueError, OverflowError):
            x, got = None, f"{p!r:.80}"
        if x is None or not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"params must be floating or complex arrays, or Python numbers, got {got}"
                f"{' at ' if path else ''}{jax.tree_util.keystr(path)}; cast it to float"
            )
        return x

    if params is None:
        raise ValueError("params must be a tree of arrays, got None; {} has no parameters")
    return jax.tree_util.tree_map_with_path(leaf, params)


def _gradient(fun: Any) -> Any:
    def value_and_gradient(params: Any) -> Any:
        value, g = jax.value_and_grad(fun)(params)
        return value, jax.tree.map(jnp.conj, g)  # optax descends along the conjugate

    return value_and_gradient


def _error(p: Any, g: Any, prox: Any, step: Any = 1.0) -> jax.Array:
    """0 exactly at a solution: the norm of the gradient, or of (p - prox(p - step*g)) / step."""
    if prox is None:
        return norm(g)
    return norm(_minus(p, prox(_descended(p, g, step), step))) / step


def _hidden(x: Any, fun: Any, prox: Prox, tol: jax.Array) -> jax.Array:
    """Whether rounding of x hides an error above tol, as a step as long as x tells."""
    length = norm(x)
    eps = jnp.finfo(length.dtype).eps

    def error_is_larger() -> jax.Array:
        g = _gradient(fun)(x)[1]
        size = norm(g)
        step = jnp.clip(length / jnp.where(size > 0, size, length), 1, _limit(length))
        return _error(x, g, prox, step) > jnp.maximum(10 * tol, 100 * eps * size)

    return jax.lax.cond(eps * length > tol, error_is_larger, lambda: jnp.asarray(False))


def _descended(p: Any, g: Any, step: Any) -> Any:
    """``p - step*g``, in float32 at least."""
    return jax.tree.map(lambda p, g: wide(p) - real_like(step, p) * wide(g), p, g)


def _minus(a: Any, b: Any) -> Any:
    """``a - b``, in float32 at least; b may come from a prox that widens it."""
    return jax.tree.map(lambda a, b: wide(a) - b.astype(wide(a).dtype), a, b)


def _limit(x: jax.Array) -> float:
    """Beyond which sizes of the dtype of ``x`` are as good as infinite: 4e28, float64 2e231."""
    return float(jnp.finfo(x.dtype).max) ** 0.75


def _rounding(params: Any) -> float:
    """Relative size of a step too small to matter; below float32 one that moves nothing at all."""
    return _eps(params) if _eps(params) < 1e-5 else 0.0


def _eps(params: Any) -> float:
    """Of the narrowest leaf; 0 without leaves."""
    return max((float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params)), default=0.0)
