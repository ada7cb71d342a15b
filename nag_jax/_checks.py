"""One wording for every out-of-range argument: what was given, what is allowed, what to do."""

import functools
import inspect
import math
import numbers
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_T = TypeVar("_T")

# What the step of a prox is called; the long names mean it wherever they stand.
_STEPS = frozenset({"step", "step_size", "stepsize", "learning_rate", "scaling"})
_SHORT_STEPS = frozenset({"t", "tau", "eta", "lr"})
# What the proximal operators and projections of jaxopt have in its place.
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


def is_array(leaf: object) -> bool:
    """Whether it is a number, an array or an abstract array."""
    if isinstance(leaf, type):  # jnp.float32 has a dtype, too
        return False
    return isinstance(leaf, int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def check_trainable(name: str, params: Any) -> None:
    """Raises ValueError for a leaf that is neither floating-point nor complex; None is no leaf.

    ``name`` says what needs such leaves.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        got = f"type {type(leaf).__name__}"
        if is_array(leaf):
            dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
            if jnp.issubdtype(dtype, jnp.inexact):
                continue
            got = f"dtype {dtype}"
        raise ValueError(
            f"{_parameter(path)} has {got}; {name} needs floating-point or complex parameters. "
            "Exclude it with optax.masked, or pass eqx.filter(model, eqx.is_inexact_array)."
        )


def check_arrays(name: str, params: Any) -> None:
    """Raises ValueError for a leaf that is no array; None is no leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_array(leaf):
            raise ValueError(
                f"{_parameter(path)} has type {type(leaf).__name__}; {name} needs arrays. "
                "Pass eqx.filter(model, eqx.is_inexact_array)."
            )


def check_prox(prox: object) -> None:
    """Raises ValueError if ``prox`` is not a function of a tree and a step, as far as it says.

    The second argument of jaxopt's ``prox(x, hyperparams, scaling)`` and of projections would
    otherwise be given the step.
    """
    wanted = "prox must be a function (tree, step) -> tree"
    if not callable(prox):
        raise ValueError(f"{wanted}, got {prox!r}; {as_static('prox')}")
    function, signature = _unwrapped(prox), _signature(prox)
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    if module.startswith("nag_jax.") and "<locals>" not in getattr(function, "__qualname__", ""):
        raise ValueError(f"{wanted}, got {name} itself; call it, and pass what it returns")
    if signature is None:
        return
    of_optax = module.startswith("optax.")
    names = list(signature.parameters)
    positional = [p.name for p in signature.parameters.values() if p.kind in _POSITIONAL]
    second = positional[1] if len(positional) > 1 else None
    misplaced = second not in _STEPS | _SHORT_STEPS and _STEPS.intersection(positional[2:])
    if not _takes(signature, 2):
        problem = "which cannot be called with a tree and a step"
    elif second and (of_optax or second in _STRENGTHS | _SIZES or misplaced):
        problem = f"which would take the step for its {second}"
    else:
        return
    advice = "in proximal.projection, with its other arguments by keyword"
    if named := _STEPS.intersection(names[1:]):
        required = [p.name for p in signature.parameters.values() if p.default is p.empty]
        given = [n for n in names[1:] if n in named or n in required or n == second]
        arguments = "".join(f", {n}={'step' if n in named else '...'}" for n in given)
        advice = f"as lambda x, step: {name}(x{arguments})"
    owner = "optax's " if of_optax else ""
    raise ValueError(
        f"{wanted}, got {owner}{name}({', '.join(names)}), {problem}; wrap it {advice}"
    )


def check_projection(project: object, arguments: dict[str, Any]) -> None:
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


def _parameter(path: tuple[Any, ...]) -> str:
    return f"parameter {jax.tree_util.keystr(path)}" if path else "params"


def _signature(function: Any) -> inspect.Signature | None:
    """The arguments that ``function`` takes; None if it does not say."""
    # Layer by layer, since functools.wraps also names a function that may have other arguments.
    while True:
        try:
            signature = inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):
            signature = None
        parameters = signature.parameters.values() if signature else ()
        named = all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters)
        own = named and hasattr(function, "__globals__")
        if own or not hasattr(function, "__wrapped__"):
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


def _takes(signature: inspect.Signature, positional: int, **keywords: Any) -> bool:
    try:
        signature.bind(*[None] * positional, **keywords)
    except TypeError:
        return False
    return True
