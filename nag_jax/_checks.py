"""One wording for every out-of-range argument: what was given, what is allowed, what to do."""

import math
import numbers
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_T = TypeVar("_T")


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_closed: bool = False,
    schedule: bool = False,
    static: bool = False,
    hint: str = "",
) -> None:
    """Raises ValueError unless ``value`` is a tracer or a number in ``[low, high)``.

    A schedule passes where one is allowed. It is only known step by step, as a tracer is only at
    run time; where the number must be ``static``, a tracer is refused.
    """
    if isinstance(value, Tracer):
        if static:
            raise ValueError(
                f"{name} must be known while tracing, got {value!r}; {as_static(name)}"
            )
        return
    if schedule and callable(value):
        return
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{']' if high_closed else ')'}"
    advice = f"; {hint}" if hint else ""
    try:
        if isinstance(value, str | bytes) or np.ndim(value):  # which float() would take, too
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        other = " or a schedule" if schedule else ", not a schedule" if callable(value) else ""
        raise ValueError(
            f"{name} must be a number in {allowed}{other}, got {value!r}{advice}"
        ) from None
    above = low < number if low_open else low <= number
    below = number <= high if high_closed else number < high
    if not (above and below):
        raise ValueError(f"{name} must be in {allowed}, got {number:g}{advice}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_count(
    name: str, value: Any, low: int = 1, *, static: bool = False, hint: str = ""
) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``low``.

    A tracer is known only at run time, so it passes if it need not be ``static``.
    """
    if isinstance(value, Tracer) and not static:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low:
        advice = "".join(f"; {text}" for text in (hint, static and as_static(name)) if text)
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}{advice}")


def check_mask(name: str, mask: Any) -> None:
    """Raises ValueError unless ``mask`` is None, a function, or a tree of bools.

    One bool for all parameters is refused: it is what ``inject_hyperparams`` makes of a function
    that it takes for a schedule and calls with the step.
    """
    if mask is None or callable(mask):
        return
    leaves, structure = jax.tree.flatten(mask)
    if jax.tree_util.treedef_is_leaf(structure) or not all(map(_is_bool, leaves)):
        raise ValueError(
            f"{name} must be a tree of bools, a function params -> such a tree, or None for all "
            f"parameters, got {mask!r}; {as_static(name)}"
        )


def _is_bool(x: Any) -> bool:
    # An array of one bool is fine, unless it is only known at run time.
    return isinstance(x, bool) or (
        not isinstance(x, Tracer) and getattr(x, "dtype", None) == np.bool_ and x.shape == ()
    )


def as_static(name: str) -> str:
    """What to do where argument ``name`` came as an array and has to be known while tracing."""
    return f'under inject_hyperparams name it in static_args=("{name}",)'


def check_optimizer(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` has the two functions of a gradient transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation such as nag_jax.nag(0.1, 0.9), got "
            f"{value!r}"
        )


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless ``dtype`` is None or a floating or complex dtype."""
    if dtype is not None and not is_inexact(dtype):
        raise ValueError(
            f"{name} must be a floating or complex dtype such as jnp.float32, or None for the "
            f"dtype of each parameter, got {dtype!r}; {as_static(name)}"
        )


def is_inexact(dtype: Any) -> bool:
    """Whether it is a floating or complex dtype, and not an array of one."""
    if isinstance(dtype, jax.Array | np.ndarray | np.generic):
        return False
    try:
        return jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:
        return False


def given_params(name: str, params: _T | None) -> _T:
    """``params``; ValueError if the update of optimizer ``name`` was called without them."""
    if params is None:
        raise ValueError(f"{name} needs params: call optimizer.update(gradients, state, params)")
    return params


def given_scalar(name: str, value: Any) -> jax.Array:
    """``value`` as an array; ValueError unless it is one real number."""
    try:
        x = jnp.asarray(value)
        got = f"{x.dtype}{list(x.shape)}"
    except (TypeError, ValueError):
        x, got = None, repr(value)
    if x is None or x.ndim or jnp.iscomplexobj(x):
        raise ValueError(f"{name} must be a real scalar, got {got}; reduce it to one number")
    return x


def check_prox(prox: Any) -> None:
    """Raises ValueError if ``prox`` is no function of a tree and a step."""
    if not callable(prox):
        raise ValueError(
            f"prox must be a function (tree, step) -> tree, got {prox!r}; {as_static('prox')}"
        )
    if (getattr(prox, "__module__", None) or "").startswith("optax."):
        raise ValueError(
            f"prox must be a function (tree, step) -> tree, got optax's {prox.__name__}, which "
            "would take the step for its own second argument; wrap it in proximal.projection"
        )
