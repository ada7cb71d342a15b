"""Where arrays lie on a mesh, and moving them there, under Auto and Explicit axes."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nag_jax._types import Leaf


def place(x: Leaf, sharding: NamedSharding) -> jax.Array:
    """``x`` with this sharding, inside and outside of jit, for Auto and Explicit axes.

    A ``jax.ShapeDtypeStruct`` is given the sharding.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return cast(jax.Array, x.update(sharding=sharding))
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    placed: jax.Array = x
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # A mesh may have axes of both types, and JAX has one function for each.
    for kind, constrain in (
        (AxisType.Explicit, jax.sharding.reshard),
        (AxisType.Auto, jax.lax.with_sharding_constraint),
    ):
        if kind in kinds.values():
            own = [tuple(n for n in axes_of(entry) if kinds[n] == kind) for entry in sharding.spec]
            placed = constrain(placed, NamedSharding(mesh, spec_of(own)))
    return placed


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def spec_of(axes: list[tuple[str, ...]]) -> PartitionSpec:
    """The PartitionSpec from the axes over which each dimension is split."""
    return PartitionSpec(*(dim if len(dim) > 1 else dim[0] if dim else None for dim in axes))


def spec_on(mesh: Mesh, x: Leaf) -> PartitionSpec:
    """How ``x`` is split over the mesh, as far as it is known; ValueError if over another mesh."""
    # Inside jit the sharding is known for Explicit axes only; NumPy arrays have none.
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


def _same_devices(a: Mesh | AbstractMesh, b: Mesh) -> bool:
    """Whether the two differ in the types of their axes at most, as far as it is known."""
    # An abstract mesh has no devices to compare.
    same = not isinstance(a, Mesh) or np.array_equal(a.device_ids, b.device_ids)
    return a.shape_tuple == b.shape_tuple and same


def is_mapped(axis: str) -> bool:
    """Whether this is traced inside ``pmap`` or ``shard_map`` over ``axis``."""
    try:
        jax.lax.axis_index(axis)
    except NameError:  # what JAX raises for an axis that is not bound
        return False
    return True


def check_axis(mesh: Mesh, axis: str) -> None:
    """Raises ValueError unless ``mesh`` is a mesh with that axis."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {mesh!r}; make one with "
            'jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))'
        )
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's axes {mesh.axis_names}, got {axis!r}")
