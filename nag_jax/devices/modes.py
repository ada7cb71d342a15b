"""How a batch is divided over devices, and its mean loss and gradient computed, in each mode."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nag_jax.devices import gradients
from nag_jax.devices.placement import place, spec_on


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices along one axis of a mesh, and how they are made to work together."""

    mesh: Mesh
    axis: str
    mode: str  # "jit", "shard_map" or "pmap"
    accumulate: int  # micro-batches of a device

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

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh of the step in place of one that the caller has set, if any; not inside jit."""
        if jax.sharding.get_abstract_mesh().empty:
            return contextlib.nullcontext()
        return jax.set_mesh(self.mesh)

    def check_traced(self, tree: Any) -> None:
        """Raises ValueError where ``jax.set_mesh`` or traced arrays allow no mesh but their own."""
        kinds = lambda mesh: list(zip(mesh.shape_tuple, mesh.axis_types, strict=True))
        traced = [x for x in jax.tree.leaves(tree) if isinstance(x, Tracer)]
        context, own = jax.sharding.get_abstract_mesh(), kinds(self.mesh)
        for mesh in (context, *(jax.typeof(x).sharding.mesh for x in traced)):
            axes = [axis for axis in kinds(mesh) if axis[1] != AxisType.Manual]
            explicit = AxisType.Explicit in {kind for _, kind in own + axes}
            if (explicit or mesh is context) and any(axis not in own for axis in axes):
                raise ValueError(
                    f"inside jit, a step made for {self.mesh} was called under jax.set_mesh, or "
                    f"with arrays, of {mesh}; pass that mesh to train_step"
                )

    def sharding(self, x: Any) -> NamedSharding:
        """Where x is to lie: split over the mesh as it is, else whole on every device."""
        spec = spec_on(self.mesh, x)
        return NamedSharding(self.mesh, spec) if any(spec) else self.whole

    def put(self, tree: Any, apart_from: Any = ()) -> Any:
        """On the mesh, no two leaves in one buffer, none in one of ``apart_from``: all are donated.

        What is on the mesh stays, anything else is copied.
        """
        seen = {id(x) for x in jax.tree.leaves(apart_from)}

        def own(x: Any) -> Any:
            mine = self._holds(x) and id(x) not in seen
            seen.add(id(x))
            if mine and self.mode == "pmap":
                return x
            moved = jax.device_put(x, self.sharding(x))
            return moved if mine else jnp.copy(moved)  # moved alone may share the buffer

        return jax.tree.map(own, tree)

    def _holds(self, x: Any) -> bool:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh == self.mesh
        if sharding is None or self.mode != "pmap" or isinstance(sharding, SingleDeviceSharding):
            return False
        # What pmap returns has a sharding of its own in jax 0.7.
        return sharding.is_fully_replicated and sharding.device_set == set(self.mesh.devices.flat)

    def splits(self, params: Any) -> bool:
        """Whether some of params are split along the axis, as far as can be seen."""
        if any(self._is_split(p) for p in jax.tree.leaves(params)):
            if self.mode != "jit":
                raise ValueError(
                    f"mode={self.mode!r} needs parameters that are whole along {self.axis!r}, got "
                    'some that are split; use mode="jit"'
                )
            return True
        return False

    def _is_split(self, x: Any) -> bool:
        sharding = getattr(jax.typeof(x) if isinstance(x, Tracer) else x, "sharding", None)
        named = isinstance(sharding, NamedSharding)
        return named and self.axis in jax.tree.leaves(tuple(sharding.spec))

    def divide(self, batch: Any) -> tuple[Any, Any]:
        """The rows that divide evenly, and the few that are left, None where there are none."""
        count = gradients.rows(batch)
        even = count - count % (self.count * self.accumulate)
        if self._whole_batch or even == count:
            return self._lay(batch), None
        batch = jax.tree.map(self._sliceable, batch)
        main = jax.tree.map(lambda x: x[:even], batch) if even else None
        return self._lay(main), jax.tree.map(lambda x: self._move(x[even:], self.whole), batch)

    def _sliceable(self, x: Any) -> Any:
        """``x`` where any of its rows can be taken, on the devices of the mesh or on the host."""
        free = AxisType.Explicit not in self.mesh.axis_types and self._holds(x)
        return x if free or not isinstance(x, jax.Array) else self._move(x, self.whole)

    def _lay(self, batch: Any) -> Any:
        """Over the devices by rows if these divide evenly, else whole on each."""
        even = batch is not None and gradients.rows(batch) % self.count == 0
        return jax.tree.map(lambda x: self._move(x, self.rows if even else self.whole), batch)

    def _move(self, x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, Tracer):  # which only Explicit axes keep from being sliced at will
            return place(x, sharding) if AxisType.Explicit in self.mesh.axis_types else x
        if not sharding.is_fully_addressable and getattr(x, "is_fully_addressable", True):
            raise ValueError(
                "of several processes each passes a batch of global arrays: make them of its own "
                "rows by jax.make_array_from_process_local_data"
            )
        return place(x, sharding)

    @property
    def _whole_batch(self) -> bool:
        return self.mode == "jit" and self.accumulate == 1

    def compile(self, update: Callable[..., Any], kept: Any) -> Callable[..., Any]:
        """``update`` with params and state donated, and back where they were, ``kept``."""
        if self.mode == "pmap":
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
        params: Any,
        rest: Any,
        key: Any,
        main: Any,
        extra: Any,
        gradient: bool = True,
    ) -> gradients.Mean:
        """Of the whole batch, the same on all devices; ``split``: whether params are."""
        if self._whole_batch:
            return gradients.of_whole(loss, params, rest, key, self._spread(main), gradient)
        if split:
            return gradients.of_pieces(
                loss, params, rest, key, self._interleaved(main), extra, gradient
            )

        def local(params: Any, rest: Any, key: Any, main: Any, extra: Any) -> gradients.Mean:
            micro = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), main)
            return gradients.of_pieces(
                loss, params, rest, key, micro, extra, gradient, self.axis, self.count
            )

        if self.mode == "pmap":
            return local(params, rest, key, main, extra)
        # Explicit axes let nothing be moved silently.
        main = jax.tree.map(lambda x: place(x, self.rows), main)
        extra = jax.tree.map(lambda x: place(x, self.whole), extra)
        whole, rows = PartitionSpec(), PartitionSpec(self.axis)
        # Unchecked, gradients are those of each device, whatever collectives the loss has of its
        # own. Checked, JAX would add them up over devices before this module does.
        mapped = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(whole, whole, whole, rows, whole),
            out_specs=whole,
            axis_names={self.axis},
            check_vma=False,
        )
        return mapped(params, rest, key, main, extra)

    def _spread(self, batch: Any) -> Any:
        explicit = AxisType.Explicit in self.mesh.axis_types
        if explicit and gradients.rows(batch) % self.count:
            return batch  # only Auto axes divide unevenly
        return jax.tree.map(lambda x: place(x, self.rows), batch)

    def _interleaved(self, batch: Any) -> Any:
        """Micro-batches along a new first axis, each with rows of every device."""
        spread = NamedSharding(self.mesh, PartitionSpec(None, self.axis))
        cut = lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1)
        return jax.tree.map(lambda x: place(cut(x), spread), batch)


class Pmapped(NamedTuple):
    """A pmapped step that is called, and lowered, as a jitted one."""

    mapped: Any
    devices: int

    def __call__(self, *arguments: Any) -> Any:
        return self.mapped(*self._stacked(*arguments))

    def lower(self, *arguments: Any) -> Any:
        return self.mapped.lower(*self._stacked(*arguments))

    def _stacked(self, params: Any, state: Any, main: Any, extra: Any) -> Any:
        """One more argument along the devices, since the batch may have too few rows for them."""
        main = jax.tree.map(lambda x: x.reshape(self.devices, -1, *x.shape[1:]), main)
        return np.arange(self.devices), params, state, main, extra
