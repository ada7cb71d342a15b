"""Arrays in the host's memory, for parts of a state that most steps do not read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nag_jax._types import Tree

_memory: Any = getattr(jax, "memory", None)  # not in jax 0.7.0


def check_memory_kind(memory_kind: str | None) -> None:
    """Raises ValueError unless it is None or "pinned_host", in a jax that can move arrays there."""
    if memory_kind not in (None, "pinned_host"):
        raise ValueError(
            f'memory_kind must be "pinned_host" or None for the memory of the device, got '
            f"{memory_kind!r}"
        )
    if memory_kind is not None and _memory is None:
        raise ValueError(f"memory_kind needs a later jax than {jax.__version__}; pass None")


def on_host(tree: Tree) -> Tree:
    """``tree`` with its arrays in pinned host memory; scalars remain where they are.

    Raises ValueError for an array on a device without such a memory.
    """

    def move(x: Any) -> Any:
        if jnp.ndim(x) == 0:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            if x.sharding is None:
                return x
            sharding = x.sharding.with_memory_kind("pinned_host")
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if isinstance(x, Tracer):
            return jax.device_put(x, _memory.Space.Host)
        for device in x.devices():
            kinds = [memory.kind for memory in device.addressable_memories()]
            if "pinned_host" not in kinds:
                raise ValueError(
                    f'memory_kind "pinned_host" is not one of the memories of {device}, {kinds}; '
                    "pass memory_kind=None"
                )
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(move, tree)


def on_device(tree: Tree) -> Tree:
    """``tree`` with its arrays in the memory of the device."""
    return jax.tree.map(
        lambda x: jax.device_put(x, _memory.Space.Device) if in_host_memory(x) else x, tree
    )


def beside(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` in the host's memory if ``old`` is there."""
    return jax.device_put(new, _memory.Space.Host) if in_host_memory(old) else new


def in_host_memory(x: Any) -> bool:
    return _memory is not None and getattr(jax.typeof(x), "memory_space", None) == (
        _memory.Space.Host
    )
