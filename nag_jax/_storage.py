"""How ``accelerate`` keeps its buffer between two steps; ``precision.py`` has the lean ones."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax._arithmetic import dtype_of, filled, map_gradients, widened
from nag_jax._blocks import BlockState, decode
from nag_jax._checks import as_static, is_floating


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
    if accumulator_dtype is not None and not is_floating(accumulator_dtype):
        raise ValueError(
            "accumulator_dtype must be a floating dtype such as jnp.float32, a storage such as "
            "nag_jax.stochastic_bfloat16(), or None for the dtype of each parameter, got "
            f"{accumulator_dtype!r}; {as_static('accumulator_dtype')}"
        )

    def store(x: Any, m: Any, memory: Any) -> tuple[Any, Any]:
        return filled(map_gradients(lambda x, m: x.astype(m.dtype), x, m), m), memory

    return Storage(lambda params: (zeros(params, accumulator_dtype), ()), store, unbiased=False)


def zeros(params: Any, dtype: Any = None, min_size: int = 0) -> Any:
    """A zero buffer like params, and sharded like them, of a dtype or of their own.

    Complex leaves stay complex, of float32 at least; leaves below ``min_size`` are float32 at
    least, too.
    """

    def zero(path: Any, p: Any) -> jax.Array:
        own = dtype_of(p)
        if not jnp.issubdtype(own, jnp.inexact):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path) or 'params'} has dtype {own}, but momentum "
                "needs floating or complex ones; leave it out with optax.masked"
            )
        if dtype is None:
            return jnp.zeros_like(p, own)  # never of a weak type
        if jnp.issubdtype(own, jnp.complexfloating):
            floating = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
            return jnp.zeros_like(p, np.promote_types(widened(floating), np.complex64))
        if math.prod(jnp.shape(p)) < min_size:
            return jnp.zeros_like(p, widened(own))
        return jnp.zeros_like(p, dtype)

    return jax.tree_util.tree_map_with_path(zero, params)


def map_numbered(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function(number of the leaf, leaf, *rest)``; a None of the first tree stays and counts."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is None)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(
        None if leaf is None else function(number, leaf, *more)
        for number, (leaf, *more) in enumerate(zip(leaves, *others, strict=True))
    )
