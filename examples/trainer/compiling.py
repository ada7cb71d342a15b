"""``jax.jit`` with the compiler's options that the models of the examples run fastest with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

FUSIONS = ("DOT", "REDUCE")


def jit(function: Callable, fusions: Sequence[str] = ("REDUCE",), **options: Any) -> Any:
    """``jax.jit(function, **options)``, compiled with :func:`compiler_options`."""
    return jax.jit(function, compiler_options=compiler_options(tuple(fusions)), **options)


@functools.cache
def compiler_options(fusions: tuple[str, ...]) -> dict[str, str]:
    """What to give to the compiler here; nothing for accelerators and for an XLA without it.

    On CPU, XLA (jax 0.10 to 0.12) leaves sums, products and convolutions to YNNPACK. Its
    convolutions take twice as long for a small CNN as XLA's own, and its products are faster in
    a GRU and slower in an MLP, so ``fusions``, some of FUSIONS, names what it is left.
    """
    if jax.default_backend() != "cpu":
        return {}
    names = ",".join(f"LIBRARY_FUSION_TYPE_{name}" for name in fusions)
    options = {"xla_cpu_experimental_ynn_fusion_type": names}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
