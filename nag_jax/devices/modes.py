"""How each mode divides a batch over devices and computes the mean loss and gradient."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.stages import Lowered, Wrapped

from nag_jax._types import ArrayLike, Mode, Params, PyTree, Tree
from nag_jax.devices import gradients
from nag_jax.devices.placement import axes_of, place, spec_of, spec_on


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices along one axis of a mesh, and the mechanism that runs a step on them."""

    mesh: Mesh
    axis: str
    mode: Mode
    accumulate: int  # micro-batches per device

    @property
    def count(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.axis))

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Replaces a mesh that the caller has set by the mesh of the step; not inside jit."""
        if jax.sharding.get_abstract_mesh().empty:
            return contextlib.nullcontext()
        return jax.set_mesh(self.mesh)

    def check_traced(self, tree: PyTree) -> None:
        """Raises ValueError if ``jax.set_mesh`` or traced arrays do not allow this mesh."""
        kinds = lambda mesh: list(zip(mesh.shape_tuple, mesh.axis_types, strict=True))
        traced = [x for x in jax.tree.leaves(tree) if isinstance(x, Tracer)]
        context, own = jax.sharding.get_abstract_mesh(), kinds(self.mesh)
        for mesh in (context, *(jax.typeof(x).sharding.mesh for x in traced)):
            # Manual axes are those of a shard_map around the step, which may differ.
            axes = [axis for axis in kinds(mesh) if axis[1] != AxisType.Manual]
            explicit = AxisType.Explicit in {kind for _, kind in own + axes}
            if (explicit or mesh is context) and any(axis not in own for axis in axes):
                raise ValueError(
                    f"inside jit, a step made for {self.mesh} was called under jax.set_mesh, or "
                    f"with arrays, of {mesh}; pass that mesh to train_step"
                )

    def sharding(self, x: ArrayLike) -> NamedSharding:
        """The sharding of ``x`` in a step: its own if ``x`` is split over the mesh, else whole."""
        spec = spec_on(self.mesh, x)
        return NamedSharding(self.mesh, spec) if any(spec) else self.whole

    def put(self, tree: Tree, apart_from: PyTree = ()) -> Tree:
        """Moves ``tree`` to the mesh, for a step that donates all of it.

        No two leaves share a buffer with each other or with ``apart_from``. Arrays that are on the
        mesh already are not copied, all others are.
        """
        seen = {id(x) for x in jax.tree.leaves(apart_from)}

        def own(x: jax.Array) -> jax.Array:
            if isinstance(x, jax.ShapeDtypeStruct):
                if self.mode == "pmap":
                    raise ValueError(
                        'mode="pmap" needs arrays, got a jax.ShapeDtypeStruct; use mode="jit" or '
                        '"shard_map"'
                    )
                return place(x, self.sharding(x))
            mine = self._holds(x) and id(x) not in seen
            seen.add(id(x))
            if mine and self.mode == "pmap":  # which also takes other shardings
                return x
            moved = jax.device_put(x, self.sharding(x))
            # device_put alone may return an array that shares the buffer of x.
            return moved if mine else jnp.copy(moved)

        return jax.tree.map(own, tree)

    def _holds(self, x: ArrayLike) -> bool:
        """Whether ``x`` is an array on the devices of the mesh."""
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh == self.mesh
        if sharding is None or self.mode != "pmap" or isinstance(sharding, SingleDeviceSharding):
            return False
        # In jax 0.7 the arrays that pmap returns have a PmapSharding.
        return sharding.is_fully_replicated and sharding.device_set == set(self.mesh.devices.flat)

    def splits(self, params: Params) -> bool:
        """Whether some of params are split along the axis, as far as it is known."""
        if any(self._is_split(p) for p in jax.tree.leaves(params)):
            if self.mode != "jit":
                raise ValueError(
                    f"mode={self.mode!r} needs parameters that are whole along {self.axis!r}, got "
                    'some that are split; use mode="jit"'
                )
            return True
        return False

    def _is_split(self, x: ArrayLike) -> bool:
        sharding = getattr(jax.typeof(x) if isinstance(x, Tracer) else x, "sharding", None)
        named = isinstance(sharding, NamedSharding)
        return named and self.axis in jax.tree.leaves(tuple(sharding.spec))

    def divide(self, batch: PyTree) -> tuple[PyTree, PyTree]:
        """The rows that divide evenly over devices and micro-batches, and the remaining rows.

        Either is None if there are no such rows.
        """
        count = gradients.rows(batch)
        even = count - count % (self.count * self.accumulate)
        if self._whole_batch or even == count:
            return self._to_devices(batch), None
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch)):
            raise ValueError(
                f"an abstract batch needs rows that divide evenly over {self.count} devices and "
                f"{self.accumulate} micro-batches, got {count}"
            )
        batch = jax.tree.map(self._sliceable, batch)
        main = jax.tree.map(lambda x: x[:even], batch) if even else None
        extra = jax.tree.map(lambda x: self._move(x[even:], self.whole), batch)
        return self._to_devices(main), extra

    def _sliceable(self, x: ArrayLike) -> ArrayLike:
        """``x`` in a place where it may be sliced: on the devices of the mesh or on the host."""
        # Explicit axes refuse slices of a split dimension.
        free = AxisType.Explicit not in self.mesh.axis_types and self._holds(x)
        return x if free or not isinstance(x, jax.Array) else self._move(x, self.whole)

    def _to_devices(self, batch: PyTree) -> PyTree:
        """The batch split over the devices by rows if these divide evenly, otherwise replicated."""
        even = batch is not None and gradients.rows(batch) % self.count == 0
        return jax.tree.map(lambda x: self._move(x, self.rows if even else self.whole), batch)

    def _move(self, x: ArrayLike, sharding: NamedSharding) -> ArrayLike:
        # Of traced arrays under Auto axes XLA chooses the placement.
        if isinstance(x, Tracer):
            return place(x, sharding) if AxisType.Explicit in self.mesh.axis_types else x
        if isinstance(x, jax.ShapeDtypeStruct):
            return place(x, sharding)
        # An array of this process alone cannot be moved to the devices of others.
        if not sharding.is_fully_addressable and getattr(x, "is_fully_addressable", True):
            raise ValueError(
                "with several processes a batch must consist of global arrays, got an array of one "
                "process; make it by jax.make_array_from_process_local_data"
            )
        return place(x, sharding)

    @property
    def _whole_batch(self) -> bool:
        """Whether the loss sees the whole batch at once."""
        return self.mode == "jit" and self.accumulate == 1

    def compile(
        self, update: Callable[..., PyTree], kept: tuple[PyTree, PyTree]
    ) -> "Wrapped | Pmapped":
        """Compiles ``update``, with params and state donated and returned in shardings ``kept``."""
        if self.mode == "pmap":
            # The first argument has a row for each device, see Pmapped.
            mapped = jax.pmap(
                lambda _, *arguments: update(*arguments),
                axis_name=self.axis,
                in_axes=(0, None, None, 0, None),
                out_axes=None,
                devices=list(self.mesh.devices.flat),
                donate_argnums=(1, 2),
            )
            return Pmapped(mapped, self.count)
        out = (*kept, self.whole, self.whole)
        return jax.jit(update, donate_argnums=(0, 1), out_shardings=out)

    def mean(
        self,
        loss: gradients.Loss,
        split: bool,
        params: Params,
        model_state: PyTree,
        key: jax.Array | None,
        main: PyTree,
        extra: PyTree,
        gradient: bool = True,
        shardings: PyTree = None,
    ) -> gradients.Mean:
        """The means over the whole batch; ``split`` is whether params are split along the axis.

        ``shardings`` are those in which the gradient is wanted; None: any.
        """
        if self._whole_batch:
            batch = self._split_rows(main)
            return gradients.of_whole(loss, params, model_state, key, batch, gradient)
        if split:
            # shard_map would gather the params, so XLA divides the work also with micro-batches.
            micro = self._interleaved(main)
            return gradients.of_pieces(loss, params, model_state, key, micro, extra, gradient)

        whole, rows = PartitionSpec(), PartitionSpec(self.axis)
        parts = whole if shardings is None else jax.tree.map(self._scattered, shardings)
        scattered = {
            i: list(part).index(self.axis)
            for i, part in enumerate(jax.tree.leaves(parts))
            if any(part)
        }
        devices = gradients.Mapped(self.axis, self.count, scattered)

        def local(
            params: Params, model_state: PyTree, key: jax.Array | None, main: PyTree, extra: PyTree
        ) -> gradients.Mean:
            micro = jax.tree.map(self._micro_batches, main)
            return gradients.of_pieces(
                loss, params, model_state, key, micro, extra, gradient, devices
            )

        if self.mode == "pmap":
            return local(params, model_state, key, main, extra)
        # shard_map does not move arrays of Explicit axes to the shardings that it needs.
        main = jax.tree.map(lambda x: place(x, self.rows), main)
        extra = jax.tree.map(lambda x: place(x, self.whole), extra)
        # Unchecked, the gradient is that of the device, whatever collectives the loss contains. If
        # checked, JAX itself would sum the gradient over devices, before the weights are applied.
        mapped = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(whole, whole, whole, rows, whole),
            out_specs=gradients.Mean._make((whole, parts, whole, whole)),
            axis_names={self.axis},
            check_vma=False,
        )
        return mapped(params, model_state, key, main, extra)

    def _scattered(self, sharding: NamedSharding) -> PartitionSpec:
        """How a reduce-scatter over the axis leaves an array that is wanted in this sharding."""
        names = [axes_of(entry) for entry in sharding.spec]
        # XLA would first gather an array that other axes split too, and JAX (0.7 to 0.12) cannot
        # lower psum_scatter beside other Explicit axes.
        alone = all(dim in ((), (self.axis,)) for dim in names)
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        del kinds[self.axis]
        scattered = alone and AxisType.Explicit not in kinds.values()
        return spec_of(names) if scattered else PartitionSpec()

    def _split_rows(self, batch: PyTree) -> PyTree:
        """A traced batch split over the devices by rows."""
        explicit = AxisType.Explicit in self.mesh.axis_types
        if explicit and gradients.rows(batch) % self.count:  # only Auto axes divide unevenly
            return batch
        return jax.tree.map(lambda x: place(x, self.rows), batch)

    def _interleaved(self, batch: PyTree) -> PyTree:
        """Micro-batches along a new first axis, each with rows of every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, self.axis))
        return jax.tree.map(lambda x: place(self._micro_batches(x), sharding), batch)

    def _micro_batches(self, x: jax.Array) -> jax.Array:
        """Every ``accumulate``-th row, along a new first axis.

        So each micro-batch has the same rows on any number of devices, and nothing moves between
        devices, since neighbouring rows go to different micro-batches.
        """
        return x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1)


class Pmapped(NamedTuple):
    """A pmapped step with the calls of a jitted one."""

    mapped: Wrapped
    devices: int

    def __call__(self, *arguments: PyTree) -> PyTree:
        return self.mapped(*self._stacked(*arguments))

    def lower(self, *arguments: PyTree) -> Lowered:
        return self.mapped.lower(*self._stacked(*arguments))

    def _stacked(
        self, params: PyTree, state: PyTree, main: PyTree, extra: PyTree
    ) -> tuple[PyTree, ...]:
        # pmap needs one argument with a row for each device, and main may be None.
        main = jax.tree.map(lambda x: x.reshape(self.devices, -1, *x.shape[1:]), main)
        return np.arange(self.devices), params, state, main, extra
