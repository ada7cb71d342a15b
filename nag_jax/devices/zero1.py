"""Optimizer state spread over devices, and whether copies on devices still agree."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nag_jax._checks import check_arrays, check_count, check_optimizer, is_array


def zero1(
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axis: str = "data",
    *,
    min_size: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits an optimizer's state over the devices of an axis; parameters stay whole (ZeRO-1).

    With N devices each keeps 1/N of every large buffer, takes that part of the gradient, computes
    that part of the update, and gathers the rest of the update from the others. The numbers are
    those of ``optimizer``. A leaf is split along its first dimension that N divides.

    What is computed from all of the gradient, such as a norm to clip by, then takes an all-reduce
    of a few numbers. In ``train_step`` with mode "jit" there are two of these, for its own norm and
    for whether all is finite; with mode "shard_map" none, but there XLA cannot make the all-reduce
    of the gradient a reduce-scatter, which has half the bytes.

    It wraps whole optimizers (clipping included), outside of ``shard_map`` and ``pmap``: in
    ``jax.jit``, in a scan, in ``train_step`` with mode "jit" or "shard_map". Under Auto axes give
    the jit around a scan of your own ``out_shardings``: XLA is else free to return parameters
    split, whatever they were inside. Parameters that are themselves split over devices (FSDP) do
    not need zero1: state follows them.

    Args:
      optimizer: any gradient transformation.
      mesh: of the devices, with Auto or Explicit axes.
      axis: the one of the mesh to split over; parameters are whole along it.
      min_size: leaves of fewer elements stay whole, at least 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its ``init`` makes no leaf whole on one device
      that it will keep split.

    Raises:
      ValueError: if optimizer is none, the mesh has no such axis or min_size is below 1; from
        update, inside ``pmap`` or ``shard_map``.

    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    >>> optimizer = nag_jax.zero1(nag_jax.nag(0.1), mesh)
    >>> state = optimizer.init({"w": jnp.zeros((64, 64))})
    >>> buffer, = [x for x in jax.tree.leaves(state) if x.ndim]
    >>> 64 // buffer.addressable_shards[0].data.shape[0] == jax.device_count()
    True

    References:
      Rajbhandari, Rasley, Ruwase, He, ZeRO: memory optimizations toward training trillion
      parameter models, 2019, arXiv:1910.02054, section 5.1 (stage 1).
    """
    check_optimizer("optimizer", optimizer)
    check_axis(mesh, axis)
    check_count("min_size", min_size)
    inner = optax.with_extra_args_support(optimizer)
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding(x: Any) -> NamedSharding:
        if np.prod(x.shape) >= min_size:
            for dimension, length in enumerate(x.shape):
                if length % mesh.shape[axis] == 0:
                    return NamedSharding(mesh, PartitionSpec(*[None] * dimension, axis))
        return whole

    def split(tree: Any) -> Any:
        def part(x: Any) -> Any:
            if not is_array(x):  # a function in an Equinox model
                return x
            x = jnp.asarray(x)  # it may be a Python number
            return place(x, sharding(x))

        return jax.tree.map(part, tree)

    def gather(tree: Any) -> Any:
        return jax.tree.map(lambda x: place(x, whole) if is_array(x) else x, tree)

    def init(params: optax.Params) -> Any:
        check_arrays("zero1", params)
        leaves = jax.tree.leaves(params)
        if any(isinstance(p, Tracer) for p in leaves):
            return split(inner.init(params))
        shardings = jax.tree.map(sharding, jax.eval_shape(inner.init, params))
        if any(isinstance(p, jax.ShapeDtypeStruct) for p in leaves):
            return jax.jit(lambda: inner.init(params), out_shardings=shardings)()
        return jax.jit(inner.init, out_shardings=shardings)(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if is_mapped(axis):
            raise ValueError(
                f"zero1 was called inside pmap or shard_map over {axis!r}; it works on whole "
                'arrays under jit: use train_step(mode="jit") or mode="shard_map"'
            )
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda p, *args, **kwargs: value_fn(gather(p), *args, **kwargs)
        if "grad" in extra_args:
            extra_args["grad"] = split(extra_args["grad"])
        updates, state = inner.update(split(updates), state, split(params), **extra_args)
        return gather(updates), split(state)

    return optax.GradientTransformationExtraArgs(init, update)


def replicas_in_sync(tree: Any) -> bool:
    """Whether devices that should hold the same numbers do, bit for bit.

    A forgotten ``pmean`` raises no error: each device trains on, and reading an array shows the
    copy of the first. This compares all copies, of whole arrays and of parts that several devices
    hold. Every process has to call it; it waits for the arrays and copies them to the host. An
    array that lives on devices of one process alone is compared within that process.

    Args:
      tree: of ``jax.Array``; other leaves are passed over.

    Returns:
      True if all copies agree (NaN with NaN of the same bits, too).

    Raises:
      ValueError: for traced arrays: inside ``jit``, ``vmap`` or ``shard_map`` there is no copy to
        look at.

    >>> nag_jax.replicas_in_sync({"w": jnp.ones(3)})
    True
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, Tracer):
            raise ValueError(
                f"replicas_in_sync needs arrays on devices, got {x!r} for "
                f"{jax.tree_util.keystr(path) or 'tree'}; call it outside of jit, on what the "
                "compiled function returned"
            )
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    arrays = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in arrays
    ]
    position = {device: number for number, device in enumerate(jax.devices())}
    digests = np.zeros((len(arrays), len(position)), np.uint32)
    for x, row in zip(arrays, digests, strict=True):
        for shard in x.addressable_shards:
            row[position[shard.device]] = zlib.crc32(np.ascontiguousarray(shard.data).tobytes())
    if jax.process_count() > 1:  # each device is the own one of one process
        digests = np.asarray(multihost_utils.process_allgather(digests)).max(axis=0)
    for x, row in zip(arrays, digests, strict=True):
        seen: dict[str, int] = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            digest = row[position[device]]
            if seen.setdefault(str(index), digest) != digest:
                return False
    return True


def place(x: Any, sharding: NamedSharding) -> Any:
    """``x`` under that sharding, inside jit and outside, for Auto and Explicit axes."""
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


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
