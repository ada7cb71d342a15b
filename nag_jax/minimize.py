"""Running an optimizer to a tolerance: ``minimize`` in one ``lax.while_loop``."""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import real_like, wide
from nag_jax._checks import check_count, check_optimizer, check_prox, check_range, given_scalar
from nag_jax._compiled import compiled
from nag_jax._implicit import hoisted, norm, with_derivatives
from nag_jax._types import ArrayLike, KeyPath, OptState, Params, Prox, PyTree, Scalar, Tree
from nag_jax.evaluation import evaluated
from nag_jax.methods.backtracking import backtracking

Fun: TypeAlias = Callable[..., PyTree]  # as the user gives it
Objective: TypeAlias = Callable[[Params], jax.Array]  # checked: its value is one real number
_Power: TypeAlias = tuple[Params, jax.Array, jax.Array, jax.Array]  # v, its last two sizes, step

_PATIENCE = 10  # steps in a row that must be too small: a warm-up and a restart make single ones
_ROUNDING_UNITS = 8  # rounding error of an iterate, in units of the precision of params
_MOST_STEPS = 2**31 - 1  # counted in int32


class Reason(enum.IntEnum):
    """Why :func:`minimize` stopped: ``Reason(int(result.reason)).name``."""

    TOLERANCE = 0  # the error is at most tol: the only success
    MAX_STEPS = 1
    NOT_FINITE = 2  # a gradient or the next params; result.params are the last finite ones
    STEP_TOO_SMALL = 3  # params move by no more than their rounding: no progress is left


class Result(NamedTuple):
    """What :func:`minimize` returns; scalars are arrays, so that it can be jitted and vmapped."""

    params: PyTree  # the iterate to evaluate, like the start
    value: jax.Array  # fun(params), without a penalty, shape=()
    error: jax.Array  # the last one measured, at most tol if converged, shape=(), float32 at least
    steps: jax.Array  # gradients evaluated, shape=(), int32
    converged: jax.Array  # reason is TOLERANCE and value is finite, shape=(), bool
    reason: jax.Array  # one of Reason, shape=(), int32
    aux: PyTree = ()  # what fun returns as well, at result.params; () without has_aux
    history: "History | tuple[()]" = ()  # () without history=True


class History(NamedTuple):
    """What :func:`minimize` measured at each step; NaN after the last one."""

    values: jax.Array  # of fun where the gradient was taken, shape=(max_steps,)
    errors: jax.Array  # shape=(max_steps,), float32 at least


class _Loop(NamedTuple):
    params: Params
    state: OptState
    error: jax.Array
    steps: jax.Array
    small: jax.Array  # steps in a row that were too small
    finite: jax.Array
    sizes: PyTree  # with a prox: recent largest sizes of the entries, which bound their rounding
    history: History | tuple[()]


def minimize(
    fun: Fun,
    params: PyTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    args: tuple[PyTree, ...] = (),
    kwargs: Mapping[str, PyTree] | None = None,
    has_aux: bool = False,
    prox: Prox | None = None,
    error: Callable[[Params], ArrayLike] | None = None,
    tol: Scalar = 1e-6,
    max_steps: int | jax.Array = 10_000,
    history: bool = False,
    implicit_diff: bool = True,
) -> Result:
    r"""Minimizes ``fun``, plus the penalty or constraint of ``prox``, from ``params``.

    The error is measured where the gradient is taken. It is the norm of the gradient, or with a
    prox

    .. math:: \|p - \mathrm{prox}_1(p - \nabla f(p))\|,

    which is 0 exactly at solutions and does not depend on the learning rate. ``error`` replaces it
    by a measure of your own, such as a duality gap. The run stops when the error is at most
    ``tol``, after ``max_steps``, when something is not finite, or when params no longer move. Where
    params are so large that their rounding would hide an error of ``tol``, the prox is also tried
    with a longer step. With a prox, ``result.params`` are an output of the prox, whatever stopped
    the run: sparse or feasible. ``minimize`` works inside ``jax.jit``, ``vmap``, ``scan`` and
    ``remat``. Outside of these it is compiled once for each ``fun``: keep the function and the
    prox, and pass numbers that change as arrays.

    ``result.params`` and ``result.value`` have derivatives of any order, in forward and reverse
    mode, with respect to all floating-point and complex arrays in ``args`` and ``kwargs``, and
    those that ``fun`` and ``prox`` close over. They come from the implicit function theorem at
    ``result.params``, not from the steps, so they are 0 with respect to the start, ``tol`` and the
    optimizer.

    * If the run converged, they are the derivatives of the solution. If it stopped for another
      reason, they are the same expressions at a point that is not a solution, an approximation that
      is as good as the point. After ``NOT_FINITE`` they are NaN.
    * If the Hessian is singular, solutions are not unique, and the derivative is the smallest
      movement (the least-norm one) that keeps the gradient at 0. If the data move such that no
      solution remains nearby, there is no derivative: forward mode gives NaN. Reverse mode does not
      know how the data will move, and counts movements of the gradient outside the range of the
      Hessian as 0.
    * With a prox they use JAX's derivative of it. At a kink, such as an entry at exactly the
      threshold of an l1 penalty, the solution has no derivative, and the result is what JAX returns
      for the prox there.
    * Inside ``lax.scan`` and ``lax.map``, JAX before 0.12 cannot take forward over reverse
      derivatives, as in ``jax.hessian``, and raises ``TypeError``. Reverse over reverse,
      ``jax.jacrev(jax.grad(f))``, works.
    * Above 1,024 unknowns the linear system is solved by conjugate gradients; NaN if they fail.

    Args:
      fun: the objective, ``fun(params, *args, **kwargs) -> scalar``, real and twice
        differentiable. It may also take its data by closure.
      params: the start, any pytree of floating-point or complex arrays and Python numbers. If
        ``prox`` is a constraint, the start may violate it.
      optimizer: any ``optax.GradientTransformation``, which must itself take proximal steps if
        there is a ``prox``. ``update`` gets ``value``, ``grad`` and ``value_fn``, as line searches
        need them. None: ``nag_jax.backtracking(prox)``, FISTA with gradient restart and a step size
        that is found automatically, at about one more value of fun for each gradient.
      args: more positional arguments of fun, a tuple of trees of arrays.
      kwargs: more arguments of fun by name, such as ``{"penalty": 0.1}``.
      has_aux: whether fun returns ``(scalar, aux)``. ``result.aux`` is aux at ``result.params``.
      prox: ``(tree, step) -> tree``, of a penalty or constraint that is added to fun; see
        ``nag_jax.proximal``. None: there is none.
      error: ``params -> scalar``, what to compare with tol, such as those of ``nag_jax.gaps``. It
        is measured after each step at the iterate to evaluate. None: the norm above.
      tol: largest error of a converged result, at least 0, in units of the gradient, or of
        ``error``.
      max_steps: the largest number of gradients, at least 1; an int if ``history`` is set.
      history: whether ``result.history`` keeps the value and the error of each step.
      implicit_diff: False to leave out the derivatives of ``result.params``, which are then 0.
        That is for a fun that JAX can differentiate only once.

    Returns:
      A :class:`Result`. Look at ``converged`` first.

    Raises:
      ValueError: for arguments out of range, a prox that does not take ``(tree, step)``, params
        that are not floating-point or complex, or a fun that does not return one real number.

    Example:
      Nothing needs to be tuned, and a run that fails reports why:

      >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> fun = lambda p: jnp.sum((a @ p - b) ** 2) / 2
      >>> prox = nag_jax.proximal.nonnegative()
      >>> result = nag_jax.minimize(fun, jnp.zeros(2), prox=prox, tol=1e-4)
      >>> print(result.converged, [f"{x:.2f}" for x in result.params])
      True ['0.00', '0.91']
      >>> result = nag_jax.minimize(fun, jnp.zeros(2), nag_jax.nag(1.0))
      >>> print(result.converged, nag_jax.Reason(int(result.reason)).name)
      False NOT_FINITE

      The derivative of the solution with respect to a penalty. Here the lasso shrinks each entry of
      the target by the penalty, to 0 at most, so the derivative is -1, 1 or 0:

      >>> target = jnp.array([3.0, -2.0, 0.1])
      >>> def solution(penalty):
      ...     fun = lambda p: jnp.sum((p - target) ** 2) / 2
      ...     prox = nag_jax.proximal.l1(penalty)
      ...     return nag_jax.minimize(fun, jnp.zeros(3), prox=prox, tol=1e-4).params
      >>> print([f"{x:.1f}" for x in jax.jacfwd(solution)(0.5)])
      ['-1.0', '1.0', '0.0']

    References:
      Blondel et al., Efficient and modular implicit differentiation, 2021, arXiv:2105.15183.
    """
    check_range("tol", tol, 0.0)
    check_count("max_steps", max_steps)
    if optimizer is not None:
        check_optimizer("optimizer", optimizer)
    if prox is not None:
        check_prox(prox)
    if not isinstance(args, tuple):
        raise ValueError(
            f"args must be a tuple, got {type(args).__name__}; for one argument give args=(x,)"
        )
    if error is not None and not callable(error):
        raise ValueError(
            f"error must be a function of params or None, got {error!r}; see nag_jax.gaps"
        )
    if history and isinstance(max_steps, jax.Array):
        raise ValueError(
            "max_steps must be an int with history=True, the length of the history, got an array"
        )
    if not isinstance(max_steps, jax.Array):
        max_steps = min(max_steps, _MOST_STEPS)
    length = int(max_steps) if history else None
    both = functools.partial(_scalar_and_aux, fun, args, dict(kwargs or {}), has_aux)
    measure = None if error is None else functools.partial(_measured, error)
    # Arrays, so that one compiled program does for all values.
    limits = jnp.asarray(tol, float), jnp.asarray(max_steps, jnp.int32)

    def solved(params: Params) -> Result:
        value = lambda params: both(params)[0]
        run = lambda params: _run(value, params, optimizer, prox, measure, *limits, length)
        # The steps are not differentiated, whatever takes part in them.
        run, data = hoisted(run, params)
        x, last, steps, reason, trace = run(*jax.lax.stop_gradient((data, params)))
        if implicit_diff:
            exists = reason != Reason.NOT_FINITE
            x = with_derivatives(x, lambda p: _value_and_gradient(value, p)[1], prox, exists)
        y, aux = both(x)
        converged = (reason == Reason.TOLERANCE) & jnp.isfinite(y) & jnp.isfinite(norm(x))
        return Result(x, y, last, steps, converged, reason, aux, trace)

    params = _floating(params)
    has_rules = prox is not None and "custom_" in str(jax.make_jaxpr(prox)(params, 1.0))
    return compiled(solved, params, owner=fun, parts=(optimizer, prox, error), opaque=has_rules)


def largest_curvature(fun: Fun, params: PyTree, *, max_steps: int = 100) -> jax.Array:
    r"""Estimates the largest curvature of ``fun`` at ``params`` by power iteration.

    .. math:: L = \max_v \frac{\|\nabla^2 f(p)\, v\|}{\|v\|}

    The estimate holds everywhere for a quadratic. Other functions may be steeper elsewhere; take
    the point of largest curvature, such as 0 for logistic regression. A learning rate is 1/L.

    Args:
      fun: the objective, ``params -> scalar``, real and twice differentiable.
      params: the point, any pytree of real arrays.
      max_steps: the largest number of products with the Hessian, at least 1. The iteration stops
        once they change L by less than 0.1 %.

    Returns:
      The estimate plus 2 %, since the iteration approaches L from below; 1 where there is no
      curvature. Float ``[]``.

    Raises:
      ValueError: if max_steps is below 1, params are not floating-point, or fun does not return one
        real number.

    Example:
      >>> curvature = jnp.array([3.0, 1.0, 0.1])
      >>> fun = lambda p: jnp.sum(curvature * p**2) / 2
      >>> print(f"{nag_jax.largest_curvature(fun, jnp.ones(3)):.2f}")
      3.06

    References:
      Golub, Van Loan, Matrix Computations, 2013, section 7.3.
    """
    check_count("max_steps", max_steps)
    value = lambda params: _scalar_and_aux(fun, (), {}, False, params)[0]
    curvature = lambda params: _power_iteration(value, params, max_steps)
    return compiled(curvature, _floating(params), owner=fun, parts=None, opaque=False)


def _power_iteration(fun: Objective, params: Params, max_steps: int) -> jax.Array:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    start = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=False)]
    scale = lambda by, v: jax.tree.map(lambda x: (wide(x) * real_like(by, x)).astype(x.dtype), v)
    unit = lambda v, size: scale(1 / jnp.where(size > 0, size, 1), v)

    def body(carry: _Power) -> _Power:
        v, _, new, k = carry
        image = jax.jvp(jax.grad(fun), (params,), (unit(v, new),))[1]
        return image, new, norm(image), k + 1

    def unsettled(carry: _Power) -> jax.Array:
        _, old, new, k = carry
        return (k < max_steps) & ((k < 2) | (jnp.abs(new - old) > 1e-3 * new))

    v = jax.tree.unflatten(structure, start)
    size = norm(v)
    carry = (v, size, size, jnp.zeros([], int))
    _, _, size, _ = jax.lax.while_loop(unsettled, body, carry)
    return jnp.where(size > 0, 1.02 * size, 1.0)


def _run(
    fun: Objective,
    params: Params,
    optimizer: optax.GradientTransformation | None,
    prox: Prox | None,
    measure: Objective | None,
    tol: jax.Array,
    max_steps: jax.Array,
    length: int | None,
) -> tuple[Params, jax.Array, jax.Array, jax.Array, History | tuple[()]]:
    """The iterate to evaluate, the error, the number of steps, why it stopped, and the history."""
    tx = optax.with_extra_args_support(backtracking(prox) if optimizer is None else optimizer)
    tol = tol.astype(norm(params).dtype)

    def unfinished(loop: _Loop) -> jax.Array:
        stop = (loop.error <= tol) | (loop.steps >= max_steps) | (loop.small >= _PATIENCE)
        return ~stop & loop.finite

    def body(loop: _Loop) -> _Loop:
        p = loop.params
        value, g = _value_and_gradient(fun, p)
        updates, state = tx.update(g, loop.state, p, value=value, grad=g, value_fn=fun)
        new = optax.apply_updates(p, updates)
        if measure is not None:
            error = measure(evaluated(new, state))
        else:
            error = norm(g) if prox is None else _error(p, g, prox, tol)
        moved = norm(_minus(new, p))
        small = moved <= _smallest_step(p) * norm(p)
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
            history=_recorded(loop.history, loop.steps, value, error),
        )

    zero = jnp.zeros([], jnp.int32)
    infinite = jnp.full_like(norm(params), jnp.inf)
    sizes = () if prox is None else jax.tree.map(jnp.abs, params)
    history = () if length is None else History(*[jnp.full(length, jnp.nan, tol.dtype)] * 2)
    loop = _Loop(params, tx.init(params), infinite, zero, zero, jnp.asarray(True), sizes, history)
    loop = jax.lax.while_loop(unfinished, body, loop)
    x, met = evaluated(loop.params, loop.state), loop.error <= tol
    if prox is not None:
        x = _settled(x, loop.sizes, prox)
    reason = jnp.where(loop.small >= _PATIENCE, Reason.STEP_TOO_SMALL, Reason.MAX_STEPS)
    reason = jnp.where(met, Reason.TOLERANCE, reason)
    reason = jnp.where(loop.finite, reason, Reason.NOT_FINITE).astype(jnp.int32)
    return x, loop.error, loop.steps, reason, loop.history


def _recorded(
    history: History | tuple[()], step: jax.Array, value: jax.Array, error: jax.Array
) -> History | tuple[()]:
    if isinstance(history, History):
        put = lambda entries, new: entries.at[step].set(new.astype(entries.dtype))
        history = History(put(history.values, value), put(history.errors, error))
    return history


def _settled(x: Params, sizes: PyTree, prox: Prox) -> Params:
    """The output of the prox that ``x``, a sum of params and a buffer, is up to rounding."""

    def cleared(x: jax.Array, size: jax.Array) -> jax.Array:
        rounding = _ROUNDING_UNITS * float(jnp.finfo(x.dtype).eps) * size
        return jnp.where(jnp.abs(x) < rounding, 0, x)

    return _projected(jax.tree.map(cleared, x, sizes), prox)


def _projected(x: Params, prox: Prox) -> Params:
    """The prox with the smallest step: a constraint projects, a penalty changes nothing."""
    step = jnp.full_like(norm(x), jnp.finfo(norm(x).dtype).tiny)
    z = prox(jax.tree.map(wide, x), step)
    return jax.tree.map(lambda x, z: z.astype(x.dtype), x, z)


def _scalar_and_aux(
    fun: Fun, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], has_aux: bool, params: Params
) -> tuple[jax.Array, PyTree]:
    """What ``fun`` returns; ValueError where its value is not one real floating number."""
    out = fun(params, *args, **kwargs)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"with has_aux fun must return a pair (scalar, aux), got {type(out).__name__}"
        )
    value, aux = cast(tuple[ArrayLike, PyTree], out if has_aux else (out, ()))
    y = given_scalar("what fun returns", value)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"what fun returns must be a floating number, got {y.dtype}[]")
    return y, aux


def _measured(error: Callable[[Params], ArrayLike], x: Params) -> jax.Array:
    return wide(given_scalar("what error returns", error(x)))


def _floating(params: PyTree) -> Params:
    """``params`` as arrays; ValueError unless they are floating or complex, or Python numbers."""

    def leaf(path: KeyPath, p: ArrayLike) -> jax.Array:
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


def _value_and_gradient(fun: Objective, params: Params) -> tuple[jax.Array, Params]:
    value, g = jax.value_and_grad(fun)(params)
    return value, jax.tree.map(jnp.conj, g)  # optax descends along the conjugate


def _error(p: Params, g: Params, prox: Prox, tol: jax.Array) -> jax.Array:
    """The norm of p - prox_1(p - g), or what a longer step shows if rounding of p may hide it."""
    of_step = lambda step: norm(_minus(p, prox(_descended(p, g, step), step))) / step
    error, length, size = of_step(jnp.ones_like(tol)).astype(tol.dtype), norm(p), norm(g)
    eps = jnp.finfo(length.dtype).eps

    def longer() -> jax.Array:
        step = length / jnp.maximum(size, 100 * tol)
        other = of_step(jnp.clip(step, 1, _limit(length))).astype(tol.dtype)
        return jnp.where(other > jnp.maximum(10 * tol, 100 * eps * size), other, error)

    return jax.lax.cond((eps * length > tol) & (error <= tol), longer, lambda: error)


def _descended(p: Tree, g: Tree, step: Scalar) -> Tree:
    """``p - step*g``, in float32 at least."""
    return jax.tree.map(lambda p, g: wide(p) - real_like(step, p) * wide(g), p, g)


def _minus(a: Tree, b: Tree) -> Tree:
    """``a - b``, in float32 at least; b may come from a prox that widens it."""
    return jax.tree.map(lambda a, b: wide(a) - b.astype(wide(a).dtype), a, b)


def _limit(x: jax.Array) -> float:
    """The size from which numbers count as infinite: 4e28 in float32, 2e231 in float64."""
    return float(jnp.finfo(x.dtype).max) ** 0.75


def _smallest_step(params: Params) -> float:
    """The relative size of a step that is too small; 0 below float32, which has coarse steps."""
    return _eps(params) if _eps(params) < 1e-5 else 0.0


def _eps(params: Params) -> float:
    """The precision of the narrowest leaf; 0 without leaves."""
    return max((float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params)), default=0.0)
