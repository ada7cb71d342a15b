"""``jax.jit`` with the compiler's options that the models of the examples run fastest with."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_ON_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def jit(function: Callable, **options: Any) -> Any:
    """``jax.jit(function, **options)``, compiled with :func:`compiler_options`."""
    return jax.jit(function, compiler_options=compiler_options(), **options)


@functools.cache
def compiler_options() -> dict[str, str]:
    """What to give to the compiler here; nothing for accelerators and for an XLA without it.

    On CPU, XLA (jax 0.10 to 0.12) hands convolutions to YNNPACK, which takes twice as long for
    those of a small CNN as its own; only products and sums are left to it.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_ON_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _ON_CPU
