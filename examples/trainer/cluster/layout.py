"""How arrays are placed: whole on every device, or with their rows spread over all devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.trainer.errors import UserError


def device_count() -> int:
    """The number of devices of all processes; UserError if jax has none of the kind asked for."""
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # without the plugin for CUDA, the latter
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "jax has no plugin for it"
        raise UserError(
            f"no device can be used with JAX_PLATFORMS={platforms}: {reason}; unset "
            "JAX_PLATFORMS to use the devices of this machine, or install jax with support for it"
        ) from None


class Layout:
    """A mesh over the devices of all processes, or over the first ``devices`` of one process.

    If there are several processes, all of them must call the methods that place arrays.
    """

    def __init__(self, devices: int = 0):
        used = jax.devices()[: devices or None]
        self.axis = "data"
        self.mesh = jax.make_mesh((len(used),), (self.axis,), (AxisType.Auto,), devices=used)
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.rows = NamedSharding(self.mesh, PartitionSpec(self.axis))

    def put_whole(self, tree: Any) -> Any:
        """Copies of arrays that all processes have, on all devices."""

        def put(x: Any) -> jax.Array:
            host = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
            return jax.make_array_from_callback(host.shape, self.whole, lambda index: host[index])

        return jax.tree.map(put, tree)

    def put_rows(self, tree: Any) -> Any:
        """A batch of which each process has its share of the rows, in order."""
        put = lambda x: jax.make_array_from_process_local_data(self.rows, x)
        return jax.tree.map(put, tree)


def host_copy(tree: Any) -> Any:
    """NumPy copies of arrays that are whole on every device."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)
