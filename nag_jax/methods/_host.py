"""Arrays in the memory of the host, for parts of a state that most steps do not read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._types import Leaf, Tree


def check_memory_kind(memory_kind: str | None) -> None:
    """Raises ValueError unless it is None or "pinned_host"."""
    if memory_kind not in (None, "pinned_host"):
        raise ValueError(
            'memory_kind must be "pinned_host" or None for the memory of the device, got '
            f"{memory_kind!r}"
        )


def on_host(tree: Tree) -> Tree:
    """``tree`` with its arrays in pinned host memory, and scalars where they are.

    Raises ValueError for an array on a device that cannot use such memory.
    """

    def move(x: Any) -> Leaf:  # an array, or an abstract one
        if jnp.ndim(x) == 0:
            return x
        if isinstance(x, Tracer):
            return jax.device_put(x, jax.memory.Space.Host)
        if x.sharding is None:  # abstract
            return x
        for device in x.sharding.device_set:
            kinds = [memory.kind for memory in device.addressable_memories()]
            if "pinned_host" not in kinds:
                raise ValueError(
                    f'memory_kind="pinned_host" needs a device that can use it, but {device} has '
                    f"{kinds}; pass None"
                )
        sharding = x.sharding.with_memory_kind("pinned_host")
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(move, tree)


def on_device(tree: Tree) -> Tree:
    """``tree`` with its arrays in the memory of the device."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree
    )


def beside(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` in the memory in which ``old`` is."""
    return jax.device_put(new, jax.memory.Space.Host) if _is_on_host(old) else new


def _is_on_host(x: jax.Array) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host
