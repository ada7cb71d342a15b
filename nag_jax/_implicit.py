"""Derivatives of a solution by the implicit function theorem: of any order, in both modes.

A solution x is a root of the gradient, or with a prox a fixed point x = prox(x - s*gradient(x)).
All of it is done over lists of real arrays, complex leaves as their real and imaginary parts: the
Jacobians of a gradient and of a prox are symmetric only there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.flatten_util import ravel_pytree

from nag_jax._arithmetic import real_like, wide

Reals = list[jax.Array]

_SMALL = 128  # unknowns up to which all eigenvalues of a matrix are found at once
_DENSE = 1024  # and up to which they are where conjugate gradients fail
_BATCH = 32  # products with a matrix at once, for its rows
_STEPS = 10_000  # of conjugate gradients at most


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` with the arrays it closes over as a first argument, and those arrays.

    ``jax.closure_convert`` leaves integers, booleans and keys in the closure, from where a rule
    for derivatives would take tracers of a trace that has ended.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*examples)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)

    def with_data(data: list[Any], *arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        return jax.tree.unflatten(structure, eval_jaxpr(jaxpr, data, *leaves))

    return with_data, closed.consts


def with_derivatives(
    x: Any,
    gradient: Callable[[Any], Any],
    prox: Callable[[Any, Any], Any] | None,
    exists: jax.Array,
) -> Any:
    """``x``, with derivatives in all that ``gradient`` and ``prox`` close over.

    Args:
      x: the solution, a tree of floating or complex arrays.
      gradient: from trees like x to the real gradient, complex where x is.
      prox: ``(tree, step) -> tree``; None: x is a root of the gradient.
      exists: whether x is a solution; if not, derivatives are NaN.
    """
    v, like = _reals(x), jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), x)
    if not v:
        return x
    solve = functools.partial(
        _solve, precision=max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(like))
    )

    def real_prox(z: Reals, step: jax.Array) -> Reals:
        after = z if prox is None else _reals(prox(_like(like, z), step))
        return [a.astype(b.dtype) for a, b in zip(after, z, strict=True)]

    real_gradient = lambda v: _reals(gradient(_like(like, v, narrow=True)))
    slope, slope_data = hoisted(real_gradient, v)
    after, after_data = hoisted(real_prox, v, norm(v))

    @jax.custom_jvp
    def solution(v: Reals, exists: jax.Array, data: Any) -> Reals:
        del exists, data
        return v

    def tangent(primals: Any, tangents: Any) -> tuple[Reals, Reals]:
        _, exists, data = primals
        v = solution(*primals)  # which knows, for derivatives of this one, that it depends on data
        floats, moves, joined = _floats(data, tangents[2])
        g = lambda v, floats: slope(joined(floats)[0], v)
        z = lambda z, step, floats: after(joined(floats)[1], z, step)
        if prox is None:
            move = _of_root(g, v, floats, moves, solve)
        else:
            move = _of_fixed_point(g, z, v, floats, moves, solve)
        # A factor, which is NaN in the transposed direction, too.
        return v, [x * jnp.where(exists, 1, jnp.nan).astype(x.dtype) for x in move]

    solution.defjvp(tangent)
    return _like(like, solution(v, exists, (slope_data, after_data)), narrow=True)


def _of_root(gradient: Any, v: Reals, data: Any, moves: Any, solve: Any) -> Reals:
    """How v moves with the data: H dv = -change, where change is how the gradient does at v."""
    change = jax.jvp(lambda data: gradient(v, data), (data,), (moves,))[1]
    hessian = jax.linearize(lambda v: gradient(v, data), v)[1]
    return solve(hessian, [-x for x in change])


def _of_fixed_point(gradient: Any, prox: Any, v: Reals, data: Any, moves: Any, solve: Any) -> Reals:
    """How v = prox(v - s*gradient) moves with the data, for a step s of about 1/|H|.

    With H the Hessian, P the derivative of the prox, and change how the right side moves at v,

        dv = P (I - sH) dv + change,

    so that dv = change + P w for the w of a symmetric system, semidefinite at a minimum,

        (P - P (I - sH) P) w = P (I - sH) change
    """
    hessian = jax.linearize(lambda v: gradient(v, data), v)[1]
    s = _step(hessian, v)
    point = lambda data: _add(v, -s, gradient(v, data))
    change = jax.jvp(lambda data: prox(point(data), s, data), (data,), (moves,))[1]
    p = jax.linearize(lambda z: prox(z, s, data), point(data))[1]

    def matrix(w: Reals) -> Reals:
        pw = p(w)
        return _add(_add(pw, -1, p(pw)), s, p(hessian(pw)))

    w = solve(matrix, p(_add(change, -s, hessian(change))))
    return _add(change, 1, p(w))


def _floats(data: Any, moved: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]]:
    """The leaves that can be differentiated, their tangents, and the data with others instead."""
    leaves, structure = jax.tree.flatten(data)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    tangents = jax.tree.leaves(moved)

    def joined(floats: list[Any]) -> Any:
        new = list(leaves)
        for i, x in zip(places, floats, strict=True):
            new[i] = x
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in places], [tangents[i] for i in places], joined


def _step(hessian: Callable[[Reals], Reals], v: Reals) -> jax.Array:
    """About 1 / the largest curvature. Only rounding depends on it, so it has no derivative."""
    product = lambda v: jax.lax.stop_gradient(hessian(v))
    unit = lambda v: [x / real_like(norm(v), x) for x in v]
    start = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in v]
    size = norm(product(jax.lax.fori_loop(0, 5, lambda _, v: unit(product(v)), unit(start))))
    return jnp.where(size > 0, 1 / size, 1)


def _solve(matrix: Callable[[Reals], Reals], b: Reals, *, precision: float) -> Reals:
    """The solution of least norm of a symmetric system, itself differentiable to any order.

    NaN if b is not in the range of the matrix. In the transposed system b is any cotangent, and
    what of it is not in the range has no effect.
    """
    # As one array: JAX cannot transpose a solve of which only some leaves depend on a tangent.
    flat, unravel = ravel_pytree(b)
    inverse = functools.partial(_pseudo_inverse, precision=precision)
    return unravel(
        jax.lax.custom_linear_solve(
            lambda x: ravel_pytree(matrix(unravel(x)))[0],
            flat,
            functools.partial(inverse, strict=True),
            functools.partial(inverse, strict=False),
            symmetric=True,
        )
    )


def _pseudo_inverse(
    product: Callable[[jax.Array], jax.Array], b: jax.Array, *, precision: float, strict: bool
) -> jax.Array:
    """By eigenvalues; with many unknowns by conjugate gradients, and by eigenvalues if these fail.

    They fail for a b that is not in the range of the matrix, and if it is not positive.
    """
    n, size = b.size, norm(b)
    unit = b / jnp.where(size > 0, size, 1)

    def dense(_: Any) -> tuple[jax.Array, jax.Array]:
        batch = min(n, _BATCH)
        rows = jnp.eye(-(-n // batch) * batch, n, dtype=b.dtype).reshape(-1, batch, n)
        rows = jax.lax.map(jax.vmap(product), rows).reshape(-1, n)[:n]
        eigenvalues, q = jnp.linalg.eigh((rows + rows.T) / 2)
        sizes = jnp.abs(eigenvalues)
        keep = sizes > 8 * precision * n**0.5 * jnp.max(sizes)
        y = unit @ q
        x = q @ jnp.where(keep, y / jnp.where(keep, eigenvalues, 1), 0)
        lost = norm(jnp.where(keep, 0, y))
        return jnp.where(strict & ~(lost <= precision**0.25), jnp.nan, x), jnp.asarray(True)

    if n <= _SMALL:
        return size * dense(None)[0]
    steps = 2 * n if n <= _DENSE else _STEPS
    cg = lambda b: jax.scipy.sparse.linalg.cg(product, b, tol=precision**0.75, maxiter=steps)[0]
    x, small = cg(unit), precision**0.4
    solved = norm(unit - product(x)) <= small

    def projected(_: Any) -> tuple[jax.Array, jax.Array]:
        # A^+ A takes out what is not in the range, first of b, in the end what rounding left in x.
        image = product(unit)
        x = cg(product(cg(cg(image))))
        solved = norm(image - product(product(x))) <= small * norm(image)
        return jnp.where(solved, x, jnp.nan), jnp.asarray(True)

    # Loops, not conds: under vmap they run only where something is not solved.
    if n <= _DENSE or not strict:
        again = dense if n <= _DENSE else projected
        x, solved = jax.lax.while_loop(lambda loop: ~loop[1], again, (x, solved))
    return size * jnp.where(solved, x, jnp.nan)


def norm(tree: Any) -> jax.Array:
    """Over all leaves, in float32 at least; scaled, so that large entries do not overflow."""
    leaves = [jnp.abs(wide(x)) for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.zeros([], float)
    largest = jnp.stack([jnp.max(x) for x in leaves]).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(sum(jnp.sum((x / scale) ** 2) for x in leaves))


def _reals(tree: Any) -> Reals:
    """The leaves in float32 at least, complex ones as two."""
    parts = lambda x: [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    return [part for leaf in jax.tree.leaves(tree) for part in parts(wide(leaf))]


def _like(x: Any, v: Reals, *, narrow: bool = False) -> Any:
    """The tree like ``x`` of which ``v`` are the reals; in the dtypes of x if ``narrow``."""
    left = iter(v)

    def leaf(x: Any) -> jax.Array:
        new = next(left)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            new = jax.lax.complex(new, next(left))
        return new.astype(x.dtype) if narrow else new

    return jax.tree.map(leaf, x)


def _add(x: Reals, scale: Any, y: Reals) -> Reals:
    return [a + real_like(scale, b) * b for a, b in zip(x, y, strict=True)]
