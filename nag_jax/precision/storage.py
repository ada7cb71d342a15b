"""How ``accelerate`` stores its buffer between two steps."""

import math
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import buffer_dtype, dtype_of, filled, map_gradients, widened
from nag_jax._checks import as_static, check_trainable, is_inexact
from nag_jax._types import BufferDType, DTypeLike, Leaf, Params, PyTree, Updates


class Storage(NamedTuple):
    """``init(params) -> (m, memory)``, ``store(x, m, memory) -> (m, memory)``, over whole trees.

    ``x`` is the new buffer in at least float32, with None where the old one stays. The update is
    made from what was stored: from ``m``, or from ``memory.decode(m)`` if the memory has that
    method.
    """

    init: Callable[[Params], tuple[Params, PyTree]]
    store: Callable[[Updates, Params, PyTree], tuple[Params, PyTree]]
    unbiased: bool = True  # False: rounded to nearest


@runtime_checkable
class _Encoded(Protocol):
    """A memory without which the stored buffer cannot be read."""

    def decode(self, m: Params) -> Params: ...


def read(m: Params, memory: PyTree) -> Params:
    """The buffer to compute with."""
    return memory.decode(m) if isinstance(memory, _Encoded) else m


def choose(accumulator_dtype: BufferDType) -> Storage:
    """The storage that ``accumulator_dtype`` stands for."""
    if isinstance(accumulator_dtype, Storage):
        return accumulator_dtype
    if accumulator_dtype is not None and not is_inexact(accumulator_dtype):
        remedy = as_static("accumulator_dtype")
        if isinstance(accumulator_dtype, FunctionType):  # such as int8_blocks without ()
            remedy = f"call it, as in {accumulator_dtype.__name__}()"
        raise ValueError(
            "accumulator_dtype must be a floating or complex dtype such as jnp.float32, a storage "
            "such as nag_jax.stochastic_bfloat16(), or None for the dtype of each parameter, got "
            f"{accumulator_dtype!r}; {remedy}"
        )

    def store(x: Updates, m: Params, memory: PyTree) -> tuple[Params, PyTree]:
        return filled(map_gradients(lambda x, m: x.astype(m.dtype), x, m), m), memory

    return Storage(lambda params: (zeros(params, accumulator_dtype), ()), store, unbiased=False)


def zeros(params: Params, dtype: DTypeLike | None = None, min_size: int = 0) -> Params:
    """A zero buffer like params, and sharded like them, of a dtype or of their own.

    Complex leaves stay complex, of float32 at least, and real ones real; leaves below ``min_size``
    are float32 at least, too. ValueError for a leaf that cannot be trained.
    """
    check_trainable("momentum", params)

    def zero(p: Leaf) -> jax.Array:
        own = dtype_of(p)
        if dtype is None:
            return jnp.zeros_like(p, own)  # never of a weak type
        if math.prod(jnp.shape(p)) < min_size and not jnp.issubdtype(own, jnp.complexfloating):
            return jnp.zeros_like(p, widened(own))
        return jnp.zeros_like(p, buffer_dtype(own, dtype))

    return jax.tree.map(zero, params)


def map_numbered(function: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """``function(number of the leaf, leaf, *rest)``; a None of the first tree stays and counts."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is None)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(
        None if leaf is None else function(number, leaf, *more)
        for number, (leaf, *more) in enumerate(zip(leaves, *others, strict=True))
    )
