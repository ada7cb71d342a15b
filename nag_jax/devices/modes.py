"""How a batch is divided over devices, and its mean loss and gradient computed, in each mode."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nag_jax.devices import gradients
from nag_jax.devices.zero1 import place


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

    def sharding(self, x: Any) -> NamedSharding:
        """Where x is to lie: where it does if that is on the mesh, else whole on every device."""
        return x.sharding if self._holds(x) else self.whole

    def put(self, tree: Any, apart_from: Any = ()) -> Any:
        """On the mesh, no two leaves in one buffer, none in one of ``apart_from``: all are donated.

        What is on the mesh stays, anything else is copied.
        """
        seen = {id(x) for x in jax.tree.leaves(apart_from)}

        def place(x: Any) -> Any:
            if isinstance(x, jax.Array) and not (self._holds(x) and id(x) not in seen):
                x = jnp.copy(x)  # device_put alone may share the buffer
            seen.add(id(x))
            return jax.device_put(x, self.sharding(x))

        return jax.tree.map(place, tree)

    def _holds(self, x: Any) -> bool:
        sharding = getattr(x, "sharding", None)
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh

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
            return batch, None
        main = jax.tree.map(lambda x: x[:even], batch) if even else None
        return main, jax.tree.map(lambda x: x[even:], batch)

    @property
    def _whole_batch(self) -> bool:
        return self.mode == "jit" and self.accumulate == 1

    def compile(
        self, update: Callable[..., Any], params: Any, state: Any, main: Any, extra: Any
    ) -> Callable[..., Any]:
        """``update`` with params and state donated, and back where they were."""
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
        kept = jax.tree.map(self.sharding, (params, state))
        even = main is not None and gradients.rows(main) % self.count == 0
        return jax.jit(
            update,
            donate_argnums=(0, 1),
            in_shardings=(*kept, self.rows if even else self.whole, self.whole),
            out_shardings=(*kept, self.whole, self.whole),
        )

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
