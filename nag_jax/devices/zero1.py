"""ZeRO-1: optimizer state split over the devices of an axis."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nag_jax._checks import check_arrays, check_count, check_optimizer, is_array
from nag_jax.devices.placement import axes_of, check_axis, is_mapped, place, spec_of, spec_on
from nag_jax.evaluation import evaluated


class Zero1State(NamedTuple):
    """State of :func:`zero1`."""

    inner: Any  # of the wrapped optimizer; its large buffers are split over the axis
    layout: Any  # static: how each parameter is split over the mesh; () if all are whole

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns the iterate of the wrapped optimizer, for :func:`eval_params`."""
        return evaluated(params, self.inner)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters that are split over a mesh lie on it.

    Inside ``jit`` with Auto axes an array does not show how it is split, so this is recorded
    where the state is made.
    """

    leaves: tuple[tuple[Any, tuple[int, ...], PartitionSpec], ...]  # path, shape, spec

    def spec(self, path: Any, shape: tuple[int, ...]) -> PartitionSpec:
        """Of a parameter, or of a state leaf that has the shape and the path of one."""
        path = _without_variable(path)
        ends = ((path[start:], shape) for start in range(len(path) + 1))  # the longest first
        return next((self._known[end] for end in ends if end in self._known), PartitionSpec())

    @functools.cached_property
    def _known(self) -> dict[Any, PartitionSpec]:
        return {(_without_variable(path), shape): spec for path, shape, spec in self.leaves}

    def __hash__(self) -> int:  # at each call of a jitted function
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.leaves)

    def __reduce__(self) -> Any:  # hashes of strings differ between processes
        return Layout, (self.leaves,)


def _without_variable(path: Any) -> Any:
    """``flax.nnx.Optimizer`` gives variables to init, and to update the arrays in them."""
    is_variable = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return path[:-1] if is_variable else path


def zero1(
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axis: str = "data",
    *,
    min_size: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits an optimizer's state over the devices along one axis of a mesh (ZeRO-1).

    With N devices along the axis, each keeps 1/N of every large buffer, takes that part of the
    gradient, computes that part of the update, and gathers the rest of the update from the others.
    The numbers are those of ``optimizer``. Parameters stay where they are. They may be split over
    other axes of the mesh (tensor parallelism); each device then keeps 1/N of the state of its
    part. The state of a parameter that is already split over this axis (FSDP) is split in the same
    way as the parameter.

    A leaf is split along the first dimension that N divides, after the split over other axes;
    dimensions that are not split yet come first. A leaf without such a dimension is not split.

    A quantity that depends on the whole gradient, such as its norm for clipping, takes an
    all-reduce of a few numbers. In ``train_step`` with mode "jit" there are two of these, for its
    own norm and for the check that all numbers are finite; with mode "shard_map" there is none, but
    there XLA cannot turn the all-reduce of the gradient into a reduce-scatter, which moves half the
    bytes.

    It wraps whole optimizers (clipping included), outside of ``shard_map`` and ``pmap``: in
    ``jax.jit``, in a scan, in ``train_step`` with mode "jit" or "shard_map". Under Auto axes, give
    the jit around a scan of your own ``out_shardings``; otherwise XLA may return parameters split.
    Call ``init`` after the parameters have been placed, and outside of ``jit``: inside, Auto axes
    do not show how parameters are split. Optimizers that combine the dimensions of a leaf (Muon,
    Adafactor, L-BFGS) need Auto axes: under Explicit ones JAX refuses products of split dimensions.

    Args:
      optimizer: any gradient transformation.
      mesh: of the devices, with Auto or Explicit axes.
      axis: name of the axis of the mesh to split over.
      min_size: leaves of fewer elements are not split, at least 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a :class:`Zero1State`. ``init``
      never holds a leaf on one device that it will split.

    Raises:
      ValueError: if optimizer is not a gradient transformation, the mesh has no such axis or
        min_size is below 1; from init, if a parameter is split over another mesh; from update, if
        called inside ``pmap`` or ``shard_map``.

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

    def with_axis(spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
        """``spec`` with one more axis, on the first dimension that can take it."""
        names = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
        parts = [math.prod(mesh.shape[name] for name in (*dim, axis)) for dim in names]
        free = [d for d, length in enumerate(shape) if length % parts[d] == 0]
        if any(axis in dim for dim in names) or math.prod(shape) < min_size or not free:
            return spec
        chosen = min(free, key=lambda d: len(names[d]))
        names[chosen] += (axis,)
        return spec_of(names)

    def shardings(tree: Any, layout: Layout, split: bool) -> Any:
        def sharding(path: Any, x: Any) -> NamedSharding:
            spec = layout.spec(path, np.shape(x))
            return NamedSharding(mesh, with_axis(spec, np.shape(x)) if split else spec)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def placed(tree: Any, layout: Layout, split: bool) -> Any:
        # A leaf may be a Python number, or a function in an Equinox model.
        arrays = jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, tree)
        put = lambda x, sharding: place(x, sharding) if is_array(x) else x
        return jax.tree.map(put, arrays, shardings(arrays, layout, split))

    def init(params: optax.Params) -> Zero1State:
        check_arrays("zero1", params)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        layout = Layout(tuple((path, np.shape(p), spec_on(mesh, p)) for path, p in leaves))
        stored = layout if any(any(spec) for *_, spec in layout.leaves) else ()
        if any(isinstance(p, Tracer) for _, p in leaves):
            return Zero1State(placed(inner.init(params), layout, True), stored)
        split = shardings(jax.eval_shape(inner.init, params), layout, True)
        if any(isinstance(p, jax.ShapeDtypeStruct) for _, p in leaves):
            return Zero1State(jax.jit(lambda: inner.init(params), out_shardings=split)(), stored)
        arrays = jax.tree.map(jnp.asarray, params)
        params = jax.device_put(arrays, shardings(arrays, layout, False))
        return Zero1State(jax.jit(inner.init, out_shardings=split)(params), stored)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Zero1State]:
        if is_mapped(axis):
            raise ValueError(
                f"zero1 was called inside pmap or shard_map over {axis!r}; it works on whole "
                'arrays under jit: use train_step(mode="jit") or mode="shard_map"'
            )
        layout = state.layout or Layout(())
        split = lambda tree: placed(tree, layout, True)
        gather = lambda tree: placed(tree, layout, False)
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda p, *args, **kwargs: value_fn(gather(p), *args, **kwargs)
        if "grad" in extra_args:
            extra_args["grad"] = split(extra_args["grad"])
        updates, new = inner.update(split(updates), state.inner, split(params), **extra_args)
        return gather(updates), Zero1State(split(new), state.layout)

    return optax.GradientTransformationExtraArgs(init, update)
