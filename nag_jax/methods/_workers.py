"""The mean over workers, the only place where ``outer`` communicates."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

from nag_jax._arithmetic import map_gradients, real_like
from nag_jax._checks import check_range, given_scalar
from nag_jax._types import ArrayLike, AxisName, Params, PyTree, Tree, Updates


class Communicate(Protocol):
    """How a mean over workers is computed, with what each worker keeps for the next one."""

    def init(self, params: Params, /) -> PyTree:
        """The residual of a worker before the first mean."""
        ...

    def mean(
        self,
        tree: Updates,
        residual: PyTree,
        axis_name: AxisName,
        weight: jax.Array | None,
        step: jax.Array,
        /,
    ) -> tuple[Updates, PyTree]:
        """The mean, the same on all workers, and the new residual of this worker.

        Args:
          tree: displacements in at least float32; None where there is no gradient. They are 0
            where the weight is.
          residual: what ``init`` or the last call returned.
          axis_name: the axis or axes of the workers.
          weight: of this worker, shape=(), float32, at least 0; None: all have the same. If all
            are 0, the mean is not used but must be computed without an error.
          step: how many means were computed before, shape=(), int32.
        """
        ...


def mean_of_workers(
    difference: Updates,
    axis_name: AxisName | None,
    weight: jax.Array | None = None,
    communicate: Communicate | None = None,
    residual: PyTree = (),
    step: jax.Array | None = None,
) -> tuple[Updates, jax.Array | tuple[()], PyTree]:
    """The weighted mean of a tree, the sum of the weights, and the new residual.

    Workers of weight 0 may have any values, also some that are not finite. If all weights are 0,
    so is the mean. The sum is ``()`` if ``weight`` is None, which means equal weights.
    """
    if axis_name is None:
        return difference, (), residual
    if weight is not None:
        difference = map_gradients(lambda d: jnp.where(weight > 0, d, 0), difference)
    if communicate is not None:
        total = () if weight is None else jax.lax.psum(weight, axis_name)
        mean, residual = communicate.mean(difference, residual, axis_name, weight, step)
        return mean, total, residual
    if weight is None:
        return _in_one_array(jax.lax.pmean, difference, axis_name), (), residual
    weighted = map_gradients(lambda d: real_like(weight, d) * d, difference)
    weighted, total = _in_one_array(jax.lax.psum, (weighted, weight), axis_name)
    divisor = jnp.where(total > 0, total, 1)
    return map_gradients(lambda d: d / real_like(divisor, d), weighted), total, residual


def _in_one_array(
    reduce: Callable[[PyTree, AxisName], PyTree], tree: Tree, axis_name: AxisName
) -> Tree:
    """``reduce(tree, axis_name)`` as one collective, if that needs no other one."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = [kind == AxisType.Manual for kind in mesh.axis_types or ()]
    one_dtype = len({x.dtype for x in jax.tree.leaves(tree)}) == 1
    # A leaf that is itself split over other axes of the mesh would be gathered first. Under vmap
    # nothing is communicated.
    if not (one_dtype and manual and all(manual)):
        return reduce(tree, axis_name)
    flat, unravel = ravel_pytree(tree)
    return unravel(reduce(flat, axis_name))


def check_workers(
    axis_name: AxisName | None, weighted: bool, communicate: Communicate | None
) -> None:
    """Raises ValueError for options of a mean that do not fit."""
    if communicate is not None and not (
        callable(getattr(communicate, "init", None))
        and callable(getattr(communicate, "mean", None))
    ):
        raise ValueError(
            "communicate must be None or have the methods init(params) and "
            f"mean(tree, residual, axis_name, weight, step), got {communicate!r}"
        )
    if axis_name is None and (weighted or communicate is not None):
        name = "weighted" if weighted else "communicate"
        raise ValueError(f"{name} needs axis_name, the axis of the workers, got None")


def given_weight(weight: ArrayLike | None, weighted: bool) -> jax.Array | None:
    """``weight`` in float32, by default 1; ValueError unless it is a scalar of at least 0.

    A traced weight is not checked for its sign.
    """
    if not weighted:
        if weight is not None:
            raise ValueError("weight was given to an optimizer without weights; set weighted=True")
        return None
    if weight is None:
        return jnp.ones([])
    check = given_scalar("weight", weight)
    check_range("weight", weight, 0.0)
    return check.astype(jnp.float32)
