"""Inner products over the leaves of a tree and over devices."""

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import varying_axes, wide


def inner_product(a: optax.Updates, b: optax.Updates, axis_name: object) -> jax.Array:
    """Real part of <a, b> over all leaves, and over the devices of ``axis_name``, in float32."""
    each = inner_products(a, b, axis_name)
    total = sum((term.astype(float) for term in each), jnp.zeros([], float))
    # Otherwise XLA on CPU repeats this sum inside the loop of each leaf that uses it, and takes
    # minutes to compile hundreds of leaves.
    return jax.lax.optimization_barrier(total) if len(each) > 1 else total


def inner_products(a: optax.Updates, b: optax.Updates, axis_name: object) -> list[jax.Array]:
    """The same for each leaf by itself."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    terms = [jnp.sum((jnp.conj(wide(x)) * wide(y)).real) for x, y in pairs]
    axes = _names(axis_name)
    # A leaf that all devices hold in full counts once, where shard_map tells which those are.
    varying = [varying_axes(x) & set(axes) for x in terms]
    over = [tuple(vary) if any(varying) else axes for vary in varying]
    for group in set(over) - {()}:
        members = [i for i, axes in enumerate(over) if axes == group]
        summed = jax.lax.psum([terms[i] for i in members], group)
        for i, term in zip(members, summed, strict=True):
            terms[i] = term
    return terms


def mean_over_devices(x: jax.Array, axis_name: object) -> jax.Array:
    """Over the devices of ``axis_name``, unless shard_map knows that all hold the same."""
    axes = _names(axis_name)
    over = tuple(axis for axis in axes if axis in varying_axes(x)) or axes
    return jax.lax.pmean(wide(x), over) if over else x


def _names(axis_name: object) -> tuple[object, ...]:
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
