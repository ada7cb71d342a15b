"""The mean over workers, the only place where ``outer`` communicates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from nag_jax._arithmetic import map_gradients, real_like
from nag_jax._checks import check_range, given_scalar
from nag_jax._types import ArrayLike, AxisName, DTypeLike, PyTree, Tree, Updates
from nag_jax.methods import communication


def mean_of_workers(
    difference: Updates,
    axis_name: AxisName | None,
    weight: jax.Array | None,
    send_dtype: DTypeLike | None,
    feedback: PyTree,
) -> tuple[Updates, PyTree, PyTree]:
    """The weighted mean of a tree, the sum of the weights, and the new state of the feedback.

    Workers of weight 0 may have any values, also some that are not finite. If all weights are 0,
    so is the mean. The sum is ``()`` if ``weight`` is None, which means equal weights.
    """
    if axis_name is None:
        return difference, (), feedback
    if weight is not None:
        difference = map_gradients(lambda d: jnp.where(weight > 0, d, 0), difference)
    if send_dtype is not None:
        return communication.mean_of_workers(difference, feedback, axis_name, weight, send_dtype)
    if weight is None:
        return _in_one_array(jax.lax.pmean, difference, axis_name), (), feedback
    weighted = map_gradients(lambda d: real_like(weight, d) * d, difference)
    weighted, total = _in_one_array(jax.lax.psum, (weighted, weight), axis_name)
    divisor = jnp.where(total > 0, total, 1)
    return map_gradients(lambda d: d / real_like(divisor, d), weighted), total, feedback


def _in_one_array(
    reduce: Callable[[PyTree, AxisName], PyTree], tree: Tree, axis_name: AxisName
) -> Tree:
    """``reduce(tree, axis_name)`` as one collective, if that needs no other one."""
    one_dtype = len({x.dtype for x in jax.tree.leaves(tree)}) == 1
    if not (one_dtype and communication.fully_manual()):
        return reduce(tree, axis_name)
    flat, unravel = ravel_pytree(tree)
    return unravel(reduce(flat, axis_name))


def check_workers(axis_name: AxisName | None, weighted: bool, send_dtype: DTypeLike | None) -> None:
    """Raises ValueError for options of a mean that do not fit."""
    if send_dtype is not None and send_dtype not in communication.DTYPES:
        raise ValueError(
            f"send_dtype must be jnp.bfloat16, jnp.int8, jnp.int4 or None, got {send_dtype!r}"
        )
    if axis_name is None and (weighted or send_dtype is not None):
        name = "weighted" if weighted else "send_dtype"
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
