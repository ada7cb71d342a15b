"""Checks of arguments. Their errors state what was given, what is allowed and what to do."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nag_jax._types import ArrayLike, DTypeLike, KeyPath, Prox, PyTree

_T = TypeVar("_T")

# Names of the step argument of a prox; the long ones mean it at any position.
_STEPS = frozenset({"step", "step_size", "stepsize", "learning_rate", "scaling"})
_SHORT_STEPS = frozenset({"t", "tau", "eta", "lr"})
# Names of what proximal operators and projections of jaxopt take at the position of the step.
_STRENGTHS = frozenset({"hyperparams", "l1reg", "l2reg"})
_SIZES = frozenset({"value", "max_value", "unit", "max_nz", "marginals", "make_solver"})
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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

    With ``schedule`` a function of the step is accepted too, unchecked. With ``static`` the number
    must be known while tracing, so a tracer is refused.
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
        # float() accepts "0.1" and arrays of one element.
        if isinstance(value, str | bytes) or np.ndim(value):
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


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_count(
    name: str, value: object, low: int = 1, *, static: bool = False, hint: str = ""
) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``low``.

    A tracer is known only at run time; it is accepted unless the number must be ``static``.
    """
    if isinstance(value, Tracer) and not static:
        return
    if isinstance(value, np.ndarray | jax.Array) and value.shape == () and value.dtype.kind in "iu":
        value = int(value)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        advice = "".join(f"; {text}" for text in (hint, static and as_static(name)) if text)
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}{advice}")


def check_mask(name: str, mask: PyTree) -> None:
    """Raises ValueError unless ``mask`` is None, a function, or a tree of bools.

    One bool for all parameters is refused: ``inject_hyperparams`` makes it of a mask function,
    which it mistakes for a schedule and calls with the step.
    """
    if mask is None or callable(mask):
        return
    leaves, structure = jax.tree.flatten(mask)
    if jax.tree_util.treedef_is_leaf(structure) or not all(map(_is_bool, leaves)):
        raise ValueError(
            f"{name} must be a tree of bools, a function params -> such a tree, or None for all "
            f"parameters, got {mask!r}; {as_static(name)}"
        )


def _is_bool(x: object) -> bool:
    if isinstance(x, Tracer):  # its value is only known at run time
        return False
    is_array_of_one = getattr(x, "dtype", None) == np.bool_ and getattr(x, "shape", None) == ()
    return isinstance(x, bool) or is_array_of_one


def as_static(name: str) -> str:
    """The advice for an argument that ``inject_hyperparams`` must not turn into an array."""
    return f'under inject_hyperparams name it in static_args=("{name}",)'


def check_optimizer(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` has the two functions of a gradient transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation such as nag_jax.nag(0.1, 0.9), got "
            f"{value!r}"
        )


def check_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Raises ValueError unless ``dtype`` is None or a floating or complex dtype."""
    if dtype is not None and not is_inexact(dtype):
        raise ValueError(
            f"{name} must be a floating or complex dtype such as jnp.float32, or None for the "
            f"dtype of each parameter, got {dtype!r}; {as_static(name)}"
        )


def is_inexact(dtype: Any) -> bool:
    """Whether it is a floating or complex dtype."""
    # issubdtype also accepts an array, which inject_hyperparams makes of some arguments.
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


def given_scalar(name: str, value: ArrayLike) -> jax.Array:
    """``value`` as an array; ValueError unless it is a real scalar."""
    try:
        x = jnp.asarray(value)
        got = f"{x.dtype}{list(x.shape)}"
    except (TypeError, ValueError):
        x, got = None, repr(value)
    if x is None or x.ndim or jnp.iscomplexobj(x):
        raise ValueError(f"{name} must be a real scalar, got {got}; reduce it to one number")
    return x


def is_array(leaf: object) -> TypeGuard[jax.Array]:
    """Whether it is a number, an array or an abstract array."""
    if isinstance(leaf, type):  # jnp.float32 has a dtype and a shape
        return False
    return isinstance(leaf, int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def check_trainable(name: str, params: PyTree) -> None:
    """Raises ValueError for a leaf that is neither floating-point nor complex; None is not a leaf.

    ``name`` is what needs such leaves.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        got = f"type {type(leaf).__name__}"
        if is_array(leaf):
            # A Python number has no dtype.
            dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
            if jnp.issubdtype(dtype, jnp.inexact):
                continue
            got = f"dtype {dtype}"
        raise ValueError(
            f"{_parameter(path)} has {got}; {name} needs floating-point or complex parameters. "
            "Exclude it with optax.masked, or pass eqx.filter(model, eqx.is_inexact_array)."
        )


def check_arrays(name: str, params: PyTree) -> None:
    """Raises ValueError for a leaf that is not an array; None is not a leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_array(leaf):
            raise ValueError(
                f"{_parameter(path)} has type {type(leaf).__name__}; {name} needs arrays. "
                "Pass eqx.filter(model, eqx.is_inexact_array)."
            )


def check_prox(prox: Prox) -> None:
    """Raises ValueError unless ``prox`` is a function of a tree and a step, judging by its names.

    Without this check ``prox(x, hyperparams, scaling)`` of jaxopt, or a projection, would take the
    step for its second argument.
    """
    wanted = "prox must be a function (tree, step) -> tree"
    if not callable(prox):
        raise ValueError(f"{wanted}, got {prox!r}; {as_static('prox')}")
    function, signature = _unwrapped(prox), _signature(prox)
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    # The proxes of this library are local functions of the factories that make them.
    if module.startswith("nag_jax.") and "<locals>" not in getattr(function, "__qualname__", ""):
        raise ValueError(f"{wanted}, got {name} itself; call it, and pass what it returns")
    if signature is None:
        return
    of_optax = module.startswith("optax.")
    problem = _misuse(signature, of_optax)
    if problem:
        names, owner = ", ".join(signature.parameters), "optax's " if of_optax else ""
        raise ValueError(
            f"{wanted}, got {owner}{name}({names}), {problem}; wrap it {_wrapped(name, signature)}"
        )


def _misuse(signature: inspect.Signature, of_optax: bool) -> str:
    """How a call with a tree and a step would go wrong; empty if it would not."""
    if not _takes(signature, 2):
        return "which cannot be called with a tree and a step"
    positional = _positional(signature)
    second = positional[1] if len(positional) > 1 else None
    # A step at a later position means that the second argument is something else.
    misplaced = second not in _STEPS | _SHORT_STEPS and _STEPS.intersection(positional[2:])
    if second and (of_optax or second in _STRENGTHS | _SIZES or misplaced):
        return f"which would take the step for its {second}"
    return ""


def _wrapped(name: str, signature: inspect.Signature) -> str:
    """How to make a prox of the function ``name``: the end of an error message."""
    parameters = signature.parameters.values()
    later = [p.name for p in parameters][1:]
    named = _STEPS.intersection(later)
    if not named:
        return "in proximal.projection, with its other arguments by keyword"
    required = {p.name for p in parameters if p.default is p.empty}
    shown = named | required | set(_positional(signature)[1:2])
    arguments = "".join(f", {n}={'step' if n in named else '...'}" for n in later if n in shown)
    return f"as lambda x, step: {name}(x{arguments})"


def _positional(signature: inspect.Signature) -> list[str]:
    return [p.name for p in signature.parameters.values() if p.kind in _POSITIONAL]


def check_projection(project: Callable[..., PyTree], arguments: dict[str, object]) -> None:
    """Raises ValueError unless ``project`` can be called with a tree and these arguments."""
    wanted = "project must be a function of a tree, with its other arguments by keyword"
    if not callable(project):
        raise ValueError(f"{wanted}, got {project!r}")
    signature = _signature(project)
    if signature is not None and not _takes(signature, 1, **arguments):
        name = getattr(project, "__name__", type(project).__name__)
        raise ValueError(
            f"{wanted}, got {name}({', '.join(signature.parameters)}) and the arguments "
            f"{list(arguments)}; give each argument that has no default, and no other"
        )


def _parameter(path: KeyPath) -> str:
    return f"parameter {jax.tree_util.keystr(path)}" if path else "params"


def _signature(function: Any) -> inspect.Signature | None:
    """The arguments that ``function`` takes; None if they are not known."""
    # One wrapper after the other, since functools.wraps copies the signature of the wrapped
    # function also to a wrapper that takes other arguments.
    while True:
        try:
            signature = inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):
            signature = None
        parameters = signature.parameters.values() if signature else ()
        named = all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters)
        # jax.jit returns an object that is not a Python function; its own signature is generic.
        reliable = named and hasattr(function, "__globals__")
        if reliable or not hasattr(function, "__wrapped__"):
            return signature
        function = function.__wrapped__


def _unwrapped(function: Any) -> Any:
    """The Python function inside of partial objects and of ``jax.jit``."""
    while not hasattr(function, "__globals__"):
        partial = isinstance(function, functools.partial)
        inner = function.func if partial else getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def _takes(signature: inspect.Signature, positional: int, **keywords: object) -> bool:
    try:
        signature.bind(*[None] * positional, **keywords)
    except TypeError:
        return False
    return True
