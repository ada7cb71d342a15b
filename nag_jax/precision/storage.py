"""How ``accelerate`` keeps its buffer between two steps; ``precision.py`` has the lean ones."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import buffer_dtype, dtype_of, filled, map_gradients, widened
from nag_jax._checks import as_static, check_trainable, is_inexact
from nag_jax.precision.blocks import BlockState, decode


class Storage(NamedTuple):
    """``init(params) -> (m, memory)``, ``store(x, m, memory) -> (m, memory)``, over whole trees.

    ``x`` holds the new buffer in float32 at least, and None where the old one stays. What
    :func:`read` gives back of the result is the buffer that the update is made from.
    """

    init: Callable[[Any], tuple[Any, Any]]
    store: Callable[[Any, Any, Any], tuple[Any, Any]]
    unbiased: bool = True  # False: rounded to nearest


def read(m: Any, memory: Any) -> Any:
    """The buffer to compute with."""
    if not isinstance(memory, BlockState):
        return m
    values = jax.tree.map(decode, m, memory.scales)
    if not jax.tree.leaves(memory.derivative):
        return values
    return jax.tree.map(lambda x, zero: x + zero.astype(x.dtype), values, memory.derivative)


def choose(accumulator_dtype: Any) -> Storage:
    """The storage that ``accumulator_dtype`` stands for."""
    if isinstance(accumulator_dtype, Storage):
        return accumulator_dtype
    if accumulator_dtype is not None and not is_inexact(accumulator_dtype):
        raise ValueError(
            "accumulator_dtype must be a floating or complex dtype such as jnp.float32, a storage "
            "such as nag_jax.stochastic_bfloat16(), or None for the dtype of each parameter, got "
            f"{accumulator_dtype!r}; {as_static('accumulator_dtype')}"
        )

    def store(x: Any, m: Any, memory: Any) -> tuple[Any, Any]:
        return filled(map_gradients(lambda x, m: x.astype(m.dtype), x, m), m), memory

    return Storage(lambda params: (zeros(params, accumulator_dtype), ()), store, unbiased=False)


def zeros(params: Any, dtype: Any = None, min_size: int = 0) -> Any:
    """A zero buffer like params, and sharded like them, of a dtype or of their own.

    Complex leaves stay complex, of float32 at least, and real ones real; leaves below ``min_size``
    are float32 at least, too. ValueError for a leaf that cannot be trained.
    """
    check_trainable("momentum", params)

    def zero(p: Any) -> jax.Array:
        own = dtype_of(p)
        if dtype is None:
            return jnp.zeros_like(p, own)  # never of a weak type
        if math.prod(jnp.shape(p)) < min_size and not jnp.issubdtype(own, jnp.complexfloating):
            return jnp.zeros_like(p, widened(own))
        return jnp.zeros_like(p, buffer_dtype(own, dtype))

    return jax.tree.map(zero, params)


def map_numbered(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function(number of the leaf, leaf, *rest)``; a None of the first tree stays and counts."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is None)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(
        None if leaf is None else function(number, leaf, *more)
        for number, (leaf, *more) in enumerate(zip(leaves, *others, strict=True))
    )
