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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nag_jax._arithmetic import as_arrays
from nag_jax._checks import check_arrays, check_count, check_optimizer, is_array
from nag_jax._types import KeyPath, OptState, Params, PyTree, Tree, Updates, transformation
from nag_jax.devices.placement import axes_of, check_axis, is_mapped, place, spec_of, spec_on
from nag_jax.evaluation import evaluated


class Zero1State(NamedTuple):
    """State of :func:`zero1`."""

    inner: OptState  # of the wrapped optimizer; its large buffers are split over the axis
    layout: "Layout | tuple[()]"  # how each parameter is split over the mesh; () if all are whole

    def iterate(self, params: Params) -> Params:
        """Returns the iterate of the wrapped optimizer, for :func:`eval_params`."""
        layout = self.layout or Layout(())

        def whole(path: KeyPath, x: jax.Array) -> jax.Array:
            sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
            mesh = getattr(sharding, "mesh", None)
            # Under Auto axes XLA gathers what it has to.
            if mesh is None or AxisType.Explicit not in mesh.axis_types:
                return x
            return place(x, NamedSharding(mesh, layout.spec(path, x.shape)))

        return evaluated(params, jax.tree_util.tree_map_with_path(whole, as_arrays(self.inner)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters that are split over a mesh lie on it.

    Inside ``jit`` the sharding of an array is not known under Auto axes, so ``init`` records it.
    """

    leaves: tuple[tuple[KeyPath, tuple[int, ...], PartitionSpec], ...]  # path, shape, spec

    def spec(self, path: KeyPath, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of a parameter, or of a leaf of the state that belongs to one.

        A leaf belongs to a parameter if its path ends with that of the parameter and it has the
        same shape.
        """
        path = _without_variable(path)
        ends = ((path[start:], shape) for start in range(len(path) + 1))  # the longest first
        return next((self._known[end] for end in ends if end in self._known), PartitionSpec())

    @functools.cached_property
    def _known(self) -> dict[tuple[KeyPath, tuple[int, ...]], PartitionSpec]:
        return {(_without_variable(path), shape): spec for path, shape, spec in self.leaves}

    # The layout is static: jit hashes it at each call, so the hash is computed once.
    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.leaves)

    # A pickle would contain the cached hash, but hashes of strings differ between processes.
    def __reduce__(self) -> tuple[type["Layout"], tuple[Any, ...]]:
        return Layout, (self.leaves,)


def _without_variable(path: KeyPath) -> KeyPath:
    # flax.nnx.Optimizer gives variables to init, but the arrays in them to update.
    is_variable = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return path[:-1] if is_variable else path


class _Split(NamedTuple):
    """How trees like params are split over one more axis of the mesh."""

    mesh: Mesh
    axis: str
    min_size: int

    def spec(self, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
        """``spec`` with one more axis, on the dimension that is best to split."""
        names = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
        parts = [math.prod(self.mesh.shape[name] for name in (*dim, self.axis)) for dim in names]
        free = [d for d, length in enumerate(shape) if length % parts[d] == 0]
        small = math.prod(shape) < self.min_size
        if any(self.axis in dim for dim in names) or small or not free:
            return spec
        # Not the last one if possible: a TPU pads rows of fewer than 128 numbers. The longest,
        # since layers that a scan goes through, stacked along a short one, should not be split: XLA
        # would not scatter their gradient. The first of those.
        last = len(shape) - 1
        chosen = min(free, key=lambda d: (len(names[d]), d == last, -shape[d]))
        names[chosen] += (self.axis,)
        return spec_of(names)

    def shardings(self, tree: PyTree, layout: Layout, split: bool) -> PyTree:
        """The shardings of params, updates or a state: as in ``layout``, or split further."""

        def sharding(path: KeyPath, x: jax.Array) -> NamedSharding:
            spec = layout.spec(path, np.shape(x))
            return NamedSharding(self.mesh, self.spec(spec, np.shape(x)) if split else spec)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def sharded(self, tree: Tree, layout: Layout, split: bool) -> Tree:
        """``tree`` in the shardings of :meth:`shardings`."""
        # A leaf may be a Python number, or a function in an Equinox model.
        arrays = jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, tree)
        put = lambda x, sharding: place(x, sharding) if is_array(x) else x
        return jax.tree.map(put, arrays, self.shardings(arrays, layout, split))


class Zero1(optax.GradientTransformationExtraArgs):
    """The result of :func:`zero1`, which tells ``train_step`` how it splits the gradient."""

    over: _Split

    def gradient_shardings(self, params: Params, state: PyTree) -> PyTree:
        """The shardings in which ``update`` uses the gradient."""
        return self.over.shardings(params, state.layout or Layout(()), split=True)


def zero1(
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axis: str = "data",
    *,
    min_size: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits an optimizer's state over the devices along one axis of a mesh (ZeRO-1).

    With N devices along the axis, each keeps 1/N of every large buffer, takes that part of the
    gradient, computes that part of the update, and gathers the other parts of the update. The
    numbers are those of ``optimizer``. In ``train_step`` that is a reduce-scatter of the gradient
    and an all-gather of the update, as many bytes as the all-reduce of plain data parallelism, also
    with ``accumulate``.

    Parameters are not moved. They may be split over other axes of the mesh (tensor parallelism);
    each device then keeps 1/N of the state of its part. The state of a parameter that is already
    split over this axis (FSDP) is split in the same way as the parameter.

    A leaf is split along a dimension that N divides, after the split over other axes. Dimensions
    that are not split yet take precedence, then all but the last, then the longest. A leaf without
    such a dimension is not split.

    A quantity that depends on the whole gradient needs an all-reduce of a few numbers. There are
    two in ``train_step``, for the norm in its metrics and for the check that all numbers are
    finite, and another one if ``optimizer`` clips. An all-reduce of the gradient remains, so that
    1.5 times as much is sent, in mode "shard_map" and with ``accumulate`` for parameters that other
    axes split and on a mesh with other Explicit axes; in mode "jit" without ``accumulate`` it may
    remain under Explicit axes, and does on CPU.

    Wrap a whole optimizer, including clipping, and call it outside of ``shard_map`` and ``pmap``:
    in ``jax.jit``, in a scan, or in ``train_step`` with mode "jit" or "shard_map". Under Auto axes,
    give ``out_shardings`` to a ``jax.jit`` around your own scan; otherwise XLA may return split
    parameters. Call ``init`` outside of ``jit`` and after the parameters have been placed, since
    inside it is not known how Auto axes split them. Optimizers that combine the dimensions of a
    leaf (Muon, Adafactor, L-BFGS) need Auto axes: under Explicit axes JAX does not allow products
    over split dimensions.

    Args:
      optimizer: any gradient transformation.
      mesh: the mesh of the devices, with Auto or Explicit axes.
      axis: the name of the axis of the mesh to split over.
      min_size: leaves with fewer elements are not split; at least 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is a :class:`Zero1State`. ``init``
      never materializes on one device a leaf that will be split.

    Raises:
      ValueError: if optimizer is not a gradient transformation, the mesh has no such axis or
        min_size is below 1; from init, if a leaf is not an array or is split over another mesh;
        from update, if called inside ``pmap`` or ``shard_map``.

    Example:
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
    optimizer = optax.with_extra_args_support(optimizer)
    over = _Split(mesh, axis, min_size)

    def init(params: Params) -> Zero1State:
        check_arrays("zero1", params)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        layout = Layout(tuple((path, np.shape(p), spec_on(mesh, p)) for path, p in leaves))
        # Stored only if a parameter is split, since it is a static part of the state.
        stored = layout if any(any(spec) for *_, spec in layout.leaves) else ()
        if any(isinstance(p, Tracer) for _, p in leaves):
            return Zero1State(over.sharded(optimizer.init(params), layout, split=True), stored)
        # Compiled with these shardings, init never makes a whole buffer on one device.
        split = over.shardings(jax.eval_shape(optimizer.init, params), layout, split=True)
        if any(isinstance(p, jax.ShapeDtypeStruct) for _, p in leaves):
            make = jax.jit(lambda: optimizer.init(params), out_shardings=split)
            return Zero1State(make(), stored)
        arrays = jax.tree.map(jnp.asarray, params)
        params = jax.device_put(arrays, over.shardings(arrays, layout, split=False))
        return Zero1State(jax.jit(optimizer.init, out_shardings=split)(params), stored)

    def update(
        updates: Updates, state: Zero1State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, Zero1State]:
        if is_mapped(axis):
            raise ValueError(
                f"zero1 was called inside pmap or shard_map over {axis!r}; it works on whole "
                'arrays under jit: use train_step(mode="jit") or mode="shard_map"'
            )
        layout = state.layout or Layout(())
        split = lambda tree: over.sharded(tree, layout, split=True)
        gather = lambda tree: over.sharded(tree, layout, split=False)
        # The user's function expects whole params; line searches call it with split ones.
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda p, *args, **kwargs: value_fn(gather(p), *args, **kwargs)
        if "grad" in extra_args:
            extra_args["grad"] = split(extra_args["grad"])
        updates, inner = optimizer.update(split(updates), state.inner, split(params), **extra_args)
        # Placed again, since under Auto axes XLA might choose another sharding for the new state.
        return gather(updates), Zero1State(split(inner), state.layout)

    result = Zero1(*transformation(init, update))
    result.over = over
    return result
