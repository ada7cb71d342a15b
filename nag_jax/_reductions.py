"""Inner products over the leaves of a tree and over devices."""

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import varying_axes, wide
from nag_jax._types import AxisName, Updates


def inner_product(a: Updates, b: Updates, axis_name: AxisName | None) -> jax.Array:
    """The real part of <a, b> over all leaves and the devices of ``axis_name``, float []."""
    each = inner_products(a, b, axis_name)
    total = sum((term.astype(float) for term in each), jnp.zeros([], float))
    # Without the barrier XLA on CPU repeats this sum inside the loop of each leaf that uses it,
    # and takes minutes to compile hundreds of leaves.
    return jax.lax.optimization_barrier(total) if len(each) > 1 else total


def inner_products(a: Updates, b: Updates, axis_name: AxisName | None) -> list[jax.Array]:
    """The real part of <x, y> for each pair of leaves, over the devices of ``axis_name``."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    terms = [jnp.sum((jnp.conj(wide(x)) * wide(y)).real) for x, y in pairs]
    axes = _names(axis_name)
    # A leaf that all devices hold in full counts once. Only shard_map knows which leaves those are.
    varying = [varying_axes(x) & set(axes) for x in terms]
    over = [tuple(vary) if any(varying) else axes for vary in varying]
    for group in set(over) - {()}:
        members = [i for i, axes in enumerate(over) if axes == group]
        summed = jax.lax.psum([terms[i] for i in members], group)
        for i, term in zip(members, summed, strict=True):
            terms[i] = term
    return terms


def mean_over_devices(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The mean over the devices of ``axis_name``, except those that hold the same ``x``."""
    axes = _names(axis_name)
    over = tuple(axis for axis in axes if axis in varying_axes(x)) or axes
    return jax.lax.pmean(wide(x), over) if over else x


def _names(axis_name: AxisName | None) -> tuple[AxisName, ...]:
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
