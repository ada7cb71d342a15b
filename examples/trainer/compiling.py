"""``jax.jit`` with the compiler options that run the models of the trainer fastest on CPU."""

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
    """The options for this device; none on accelerators and for versions of XLA without them.

    On CPU, XLA (jax 0.10 to 0.12) uses YNNPACK for sums, products and convolutions. For a small
    CNN, its convolutions take twice as long as XLA's own; its products are faster in a GRU and
    slower in an MLP. ``fusions``, a subset of FUSIONS, names the operations that may use it.
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
