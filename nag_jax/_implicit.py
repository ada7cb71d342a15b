"""Derivatives of a solution by the implicit function theorem: of any order, in both modes.

A solution x is a root of the gradient, or with a prox a fixed point x = prox(x - s*gradient(x)).
All of it is done over lists of real arrays, complex leaves as their real and imaginary parts: the
Jacobians of a gradient and of a prox are symmetric only there.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.flatten_util import ravel_pytree

from nag_jax._arithmetic import real_like, wide
from nag_jax._types import Params, Prox, PyTree, Scalar, Tree

Reals: TypeAlias = list[jax.Array]
Floats: TypeAlias = list[jax.Array]  # the leaves of the data that can be differentiated
Linear: TypeAlias = Callable[[Reals], Reals]
Solve: TypeAlias = Callable[[Linear, Reals], Reals]  # of a symmetric system

_SMALL = 128  # unknowns up to which a system is solved by the eigenvalues of its matrix
_DENSE = 1024  # the same where conjugate gradients fail
_BATCH = 32  # rows of a matrix that are computed at once
_STEPS = 10_000  # largest number of steps of conjugate gradients


def hoisted(
    function: Callable[..., PyTree], *examples: PyTree
) -> tuple[Callable[..., PyTree], list[jax.Array]]:
    """``function`` with the arrays it closes over as a first argument, and those arrays.

    ``jax.closure_convert`` leaves integers, booleans and keys in the closure, from where a rule
    for derivatives would take tracers of a trace that has ended.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*examples)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)

    def with_data(data: list[jax.Array], *arguments: PyTree) -> PyTree:
        leaves = jax.tree.leaves(arguments)
        return jax.tree.unflatten(structure, eval_jaxpr(jaxpr, data, *leaves))

    return with_data, closed.consts


def with_derivatives(
    x: Params,
    gradient: Callable[[Params], Params],
    prox: Prox | None,
    exists: jax.Array,
) -> Params:
    """Returns ``x`` with derivatives with respect to all that ``gradient`` and ``prox`` close over.

    Args:
      x: the solution, a tree of floating or complex arrays.
      gradient: from trees like x to the real gradient, complex where x is.
      prox: ``(tree, step) -> tree``; None: x is a root of the gradient.
      exists: whether x is a solution; if not, derivatives are NaN.

    Returns:
      The values of x.
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

    @jax.custom_vjp
    def kept(v: Reals, exists: jax.Array, data: PyTree) -> Reals:
        del exists, data
        return v

    def forward(*primals: PyTree) -> tuple[Reals, PyTree]:
        return solution(*primals), primals

    def backward(primals: PyTree, cotangent: Reals) -> PyTree:
        return jax.vjp(solution, *primals)[1](cotangent)

    kept.defvjp(forward, backward)

    @jax.custom_jvp
    def solution(v: Reals, exists: jax.Array, data: PyTree) -> Reals:
        # Before JAX 0.12, second derivatives of a scan drop the rule of custom_jvp, and then
        # differentiate this function. They keep the rule of custom_vjp.
        return kept(v, exists, data)

    def tangent(primals: PyTree, tangents: PyTree) -> tuple[Reals, Reals]:
        _, exists, data = primals
        v = solution(*primals)  # not primals[0]: v depends on data, for higher derivatives
        floats, moves, joined = _floats(data, tangents[2])
        g = lambda v, floats: slope(joined(floats)[0], v)
        z = lambda z, step, floats: after(joined(floats)[1], z, step)
        if prox is None:
            move = _of_root(g, v, floats, moves, solve)
        else:
            move = _of_fixed_point(g, z, v, floats, moves, solve)
        # A factor is NaN in reverse mode too.
        return v, [x * jnp.where(exists, 1, jnp.nan).astype(x.dtype) for x in move]

    solution.defjvp(tangent)
    return _like(like, solution(v, exists, (slope_data, after_data)), narrow=True)


def _of_root(
    gradient: Callable[[Reals, Floats], Reals], v: Reals, data: Floats, moves: Floats, solve: Solve
) -> Reals:
    """The tangent of v: H dv = -change, where change is the tangent of the gradient at fixed v."""
    change = jax.jvp(lambda data: gradient(v, data), (data,), (moves,))[1]
    hessian = jax.linearize(lambda v: gradient(v, data), v)[1]
    return solve(hessian, [-x for x in change])


def _of_fixed_point(
    gradient: Callable[[Reals, Floats], Reals],
    prox: Callable[[Reals, jax.Array, Floats], Reals],
    v: Reals,
    data: Floats,
    moves: Floats,
    solve: Solve,
) -> Reals:
    """The tangent of v = prox(v - s*gradient), for a step s of about 1/|H|.

    With H the Hessian, P the derivative of the prox, and change the tangent of the right side at
    fixed v,

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


def _floats(data: PyTree, moved: PyTree) -> tuple[Floats, Floats, Callable[[Floats], PyTree]]:
    """The leaves that can be differentiated, their tangents, and a function that replaces them."""
    leaves, structure = jax.tree.flatten(data)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    tangents = jax.tree.leaves(moved)

    def joined(floats: Floats) -> PyTree:
        new = list(leaves)
        for i, x in zip(places, floats, strict=True):
            new[i] = x
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in places], [tangents[i] for i in places], joined


def _step(hessian: Linear, v: Reals) -> jax.Array:
    """About 1/(largest curvature), without a derivative, since only rounding depends on it."""
    product = lambda v: jax.lax.stop_gradient(hessian(v))
    unit = lambda v: [x / real_like(norm(v), x) for x in v]
    start = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in v]
    size = norm(product(jax.lax.fori_loop(0, 5, lambda _, v: unit(product(v)), unit(start))))
    return jnp.where(size > 0, 1 / size, 1)


def _solve(matrix: Linear, b: Reals, *, precision: float) -> Reals:
    """The least-norm solution of a symmetric system, itself differentiable to any order.

    NaN if b is not in the range of the matrix. The transposed system is solved for any b, after
    projecting it onto the range: there b is a cotangent, which may have any direction.
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
    """The product of the pseudo-inverse with ``b``; if ``strict``, NaN for a b outside the range.

    It uses eigenvalues for few unknowns, otherwise conjugate gradients. These fail if b is not in
    the range of the matrix, or if the matrix is not positive semidefinite; then eigenvalues are
    used again, up to a number of unknowns where a dense matrix still fits.
    """
    n, size = b.size, norm(b)
    unit = b / jnp.where(size > 0, size, 1)

    def dense(_: PyTree) -> tuple[jax.Array, jax.Array]:
        batch = min(n, _BATCH)
        rows = jnp.eye(-(-n // batch) * batch, n, dtype=b.dtype).reshape(-1, batch, n)
        rows = jax.lax.map(jax.vmap(product), rows).reshape(-1, n)[:n]
        x, lost = _least_norm((rows + rows.T) / 2, unit, precision)
        return jnp.where(strict & ~(lost <= small), jnp.nan, x), jnp.asarray(True)

    small = precision**0.4
    if n <= _SMALL:
        return size * dense(None)[0]
    steps = 2 * n if n <= _DENSE else _STEPS
    cg = lambda b: jax.scipy.sparse.linalg.cg(product, b, tol=precision**0.75, maxiter=steps)[0]
    x = cg(unit)
    solved = norm(unit - product(x)) <= small

    def projected(_: PyTree) -> tuple[jax.Array, jax.Array]:
        # A^+ A projects onto the range: first b, and in the end x, which rounding has moved.
        image = product(unit)
        x = cg(product(cg(cg(image))))
        solved = norm(image - product(product(x))) <= small * norm(image)
        return jnp.where(solved, x, jnp.nan), jnp.asarray(True)

    # Loops, not conds: under vmap they run only where something is not solved.
    if n <= _DENSE or not strict:
        again = dense if n <= _DENSE else projected
        x, solved = jax.lax.while_loop(lambda loop: ~loop[1], again, (x, solved))
    return size * jnp.where(solved, x, jnp.nan)


def _least_norm(a: jax.Array, b: jax.Array, precision: float) -> tuple[jax.Array, jax.Array]:
    """The pseudo-inverse of ``a`` times ``b``, and how much of ``b`` is outside the range.

    Rows and columns are scaled to a diagonal of 1 before small eigenvalues are taken for 0, so that
    parameters of different units do no harm: with D the scales, x = D z and (D a D) z = D b.
    """
    n = b.size
    diagonal = jnp.maximum(jnp.abs(jnp.diag(a)), precision * jnp.max(jnp.abs(a), axis=1))
    d = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    scaled = d[:, None] * a * d[None, :]
    eigenvalues, q = jnp.linalg.eigh(scaled)
    sizes = jnp.abs(eigenvalues)
    # What rounding of the entries, and of eigh, makes of an eigenvalue that is 0.
    rounding = precision * norm(scaled) / n**0.5
    keep = sizes > 8 * jnp.maximum(rounding, jnp.finfo(a.dtype).eps * jnp.max(sizes))
    # The null space of a is D times that of the scaled matrix.
    null, r = jnp.linalg.qr(d[:, None] * jnp.where(keep[None, :], 0, q))
    null = jnp.where(jnp.diag(r)[None, :] != 0, null, 0)
    outside = lambda v: null @ (v @ null)
    z = (d * (b - outside(b))) @ q
    x = d * (q @ jnp.where(keep, z / jnp.where(keep, eigenvalues, 1), 0))
    lost, size = norm(jnp.where(keep, 0, (d * b) @ q)), norm(d * b)
    return x - outside(x), lost / jnp.where(size > 0, size, 1)


def norm(tree: PyTree) -> jax.Array:
    """The norm over all leaves, in at least float32, without overflow in the squares."""
    leaves = [jnp.abs(wide(x)) for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.zeros([], float)
    largest = jnp.stack([jnp.max(x) for x in leaves]).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(sum(jnp.sum((x / scale) ** 2) for x in leaves))


def _reals(tree: PyTree) -> Reals:
    """The leaves in at least float32, each complex one as its real and imaginary parts."""
    parts = lambda x: [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    return [part for leaf in jax.tree.leaves(tree) for part in parts(wide(leaf))]


def _like(x: Tree, v: Reals, *, narrow: bool = False) -> Tree:
    """The inverse of :func:`_reals`: a tree like ``x``, in the dtypes of x if ``narrow``."""
    left = iter(v)

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        new = next(left)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            new = jax.lax.complex(new, next(left))
        return new.astype(x.dtype) if narrow else new

    return jax.tree.map(leaf, x)


def _add(x: Reals, scale: Scalar, y: Reals) -> Reals:
    """``x + scale*y``."""
    return [a + real_like(scale, b) * b for a, b in zip(x, y, strict=True)]
