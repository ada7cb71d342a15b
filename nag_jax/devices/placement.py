"""Where arrays lie on a mesh, and moving them there, under Auto and Explicit axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def place(x: Any, sharding: NamedSharding) -> Any:
    """``x`` under that sharding, inside jit and outside, for Auto and Explicit axes."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for kind, constrain in (
        (AxisType.Explicit, jax.sharding.reshard),
        (AxisType.Auto, jax.lax.with_sharding_constraint),
    ):
        if kind in kinds.values():
            own = [tuple(n for n in axes_of(entry) if kinds[n] == kind) for entry in sharding.spec]
            x = constrain(x, NamedSharding(mesh, spec_of(own)))
    return x


def axes_of(entry: Any) -> tuple[Any, ...]:
    """The axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def spec_of(axes: list[tuple[Any, ...]]) -> PartitionSpec:
    """From the axes over which each dimension is split."""
    return PartitionSpec(*(dim if len(dim) > 1 else dim[0] if dim else None for dim in axes))


def spec_on(mesh: Mesh, x: Any) -> PartitionSpec:
    """How ``x`` is split over the mesh, as far as can be seen; ValueError if over another one."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    if sharding is None or not (any(sharding.spec) if named else not sharding.is_fully_replicated):
        return PartitionSpec()
    if named and (sharding.mesh == mesh or _same_devices(sharding.mesh, mesh)):
        return sharding.spec
    raise ValueError(
        f"an array of shape {jnp.shape(x)} is split over devices by {sharding}, which is not of "
        f"the mesh {mesh.shape}; pass its mesh, or move it with jax.device_put"
    )


def _same_devices(a: Any, b: Mesh) -> bool:
    """Whether ``a`` is ``b`` but for the types of axes, or is abstract and may be."""
    same = not isinstance(a, Mesh) or np.array_equal(a.device_ids, b.device_ids)
    return a.shape_tuple == b.shape_tuple and same


def is_mapped(axis: str) -> bool:
    """Whether this is traced inside ``pmap`` or ``shard_map`` over ``axis``."""
    try:
        jax.lax.axis_index(axis)
    except NameError:
        return False
    return True


def check_axis(mesh: Any, axis: Any) -> None:
    """Raises ValueError unless ``mesh`` is one and has that axis."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {mesh!r}; make one with "
            'jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))'
        )
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's axes {mesh.axis_names}, got {axis!r}")
