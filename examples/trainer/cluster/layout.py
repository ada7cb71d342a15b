"""Where arrays lie: whole on every device, or their rows spread over all devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Layout:
    """One mesh over the devices of all processes, or over the first ``devices`` of one process.

    Methods that place arrays must be called by every process alike.
    """

    def __init__(self, devices: int = 0):
        used = jax.devices()[: devices or None]
        self.mesh = jax.make_mesh((len(used),), ("data",), (AxisType.Auto,), devices=used)
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.rows = NamedSharding(self.mesh, PartitionSpec("data"))

    def put_whole(self, tree: Any) -> Any:
        """Copies of what every process holds alike, on all devices."""

        def put(x: Any) -> jax.Array:
            host = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
            return jax.make_array_from_callback(host.shape, self.whole, lambda index: host[index])

        return jax.tree.map(put, tree)

    def put_rows(self, tree: Any) -> Any:
        """The batch of which every process holds its share of the rows, in their order."""
        put = lambda x: jax.make_array_from_process_local_data(self.rows, x)
        return jax.tree.map(put, tree)

    def constrain(self, batch: Any) -> Any:
        """Inside jit: the rows of a batch spread over the devices."""
        return jax.lax.with_sharding_constraint(batch, self.rows)


def host_copy(tree: Any) -> Any:
    """numpy copies of arrays that are whole on every device."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)
