"""A check that the copies of an array on several devices still agree."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils


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
