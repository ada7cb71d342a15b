"""A check that the copies of an array on several devices are equal."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from nag_jax._types import PyTree


def replicas_in_sync(tree: PyTree) -> bool:
    """Whether devices that should hold the same numbers do, bit for bit.

    A missing ``pmean`` raises no error: the devices continue with different numbers, and reading an
    array shows the copy of the first device. This function compares all copies, both of whole
    arrays and of parts that several devices hold. It waits for the arrays and copies them to the
    host. Every process must call it. An array on the devices of a single process is compared within
    that process.

    Args:
      tree: any pytree of ``jax.Array``; other leaves are ignored.

    Returns:
      True if all copies agree; NaNs agree if they have the same bits.

    Raises:
      ValueError: for traced arrays, inside ``jit``, ``vmap`` or ``shard_map``, where copies cannot
        be read.

    Example:
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
    # Keys have no bytes in NumPy.
    arrays = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in arrays
    ]
    position = {device: number for number, device in enumerate(jax.devices())}
    # Digests instead of the numbers, which would be too many to send between processes.
    digests = np.zeros((len(arrays), len(position)), np.uint32)
    for x, row in zip(arrays, digests, strict=True):
        for shard in x.addressable_shards:
            row[position[shard.device]] = zlib.crc32(np.ascontiguousarray(shard.data).tobytes())
    if jax.process_count() > 1:
        # Each column is filled by the process of the device, and 0 in the others.
        digests = np.asarray(multihost_utils.process_allgather(digests)).max(axis=0)
    for x, row in zip(arrays, digests, strict=True):
        # By the part of the array; slices themselves are not hashable.
        seen: dict[str, int] = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            digest = row[position[device]]
            if seen.setdefault(str(index), digest) != digest:
                return False
    return True
