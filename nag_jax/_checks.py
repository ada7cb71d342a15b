"""One wording for every out-of-range argument: what was given, what is allowed, what to do."""

import math
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    hint: str = "",
) -> None:
    """Raises ValueError unless ``value`` is a schedule, a tracer or a number in ``[low, high)``.

    Schedules are only known step by step and tracers only at run time, so both pass.
    """
    if callable(value) or isinstance(value, Tracer):
        return
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g})"
    advice = f"; {hint}" if hint else ""
    try:
        if isinstance(value, str):  # which float() would parse
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number in {allowed} or a schedule, got {value!r}{advice}"
        ) from None
    if not (low < number if low_open else low <= number) or not number < high:
        raise ValueError(f"{name} must be in {allowed}, got {number:g}{advice}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless ``dtype`` is None or a floating dtype."""
    if dtype is not None and not is_floating(dtype):
        raise ValueError(
            f"{name} must be a floating dtype such as jnp.float32, or None for the dtype of each "
            f'parameter, got {dtype!r}; under inject_hyperparams name it in static_args=("{name}",)'
        )


def is_floating(dtype: Any) -> bool:
    """Whether it is a floating dtype, and no array of one."""
    try:
        return jnp.issubdtype(dtype, jnp.floating) and not hasattr(dtype, "shape")
    except TypeError:
        return False


def check_prox(prox: Any) -> None:
    """Raises ValueError if ``prox`` is no function of a tree and a step."""
    if not callable(prox):
        raise ValueError(f"prox must be a function (tree, step) -> tree, got {prox!r}")
    if (getattr(prox, "__module__", None) or "").startswith("optax."):
        raise ValueError(
            f"prox must be a function (tree, step) -> tree, got optax's {prox.__name__}, which "
            "would take the step for its own second argument; wrap it in proximal.projection"
        )
