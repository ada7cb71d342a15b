"""Programs that stay compiled from one call outside of ``jax.jit`` to the next."""

import weakref
from collections.abc import Callable, Hashable
from typing import TypeAlias

import jax
from jax.core import Tracer, eval_jaxpr

from nag_jax._types import PyTree, Tree

Run: TypeAlias = Callable[[list[jax.Array], list[jax.Array]], list[jax.Array]]
Key: TypeAlias = tuple[Hashable, ...]

# The programs of each function, by their text and what is not in it.
_PROGRAMS: weakref.WeakKeyDictionary[object, dict[Key, Run]] = weakref.WeakKeyDictionary()
_KEPT = 8  # programs of one function


def compiled(
    program: Callable[[PyTree], Tree],
    argument: PyTree,
    *,
    owner: object,
    parts: Hashable,
    opaque: bool,
) -> Tree:
    """Returns ``program(argument)``, from a compiled program that is kept for later calls.

    The program is traced at each call, so that whatever it closes over may change: arrays are
    arguments of the compiled program, and everything else is in its text. A compiled program with
    the same text is used again. It is dropped with its owner, and holds none of the arrays.

    Args:
      program: a function of one tree of arrays.
      argument: that tree.
      owner: the function for which programs are kept, the one that the user passed.
      parts: other functions in the program. Callbacks and custom derivatives are not in its text,
        so a program that has them is used again only for equal parts.
      opaque: whether the program has custom derivatives.
    """
    leaves, structure = jax.tree.flatten(argument)
    flat = lambda *leaves: program(jax.tree.unflatten(structure, leaves))
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr = closed.jaxpr
    run = jax.jit(lambda data, leaves: eval_jaxpr(jaxpr, data, *leaves))
    if not any(isinstance(x, Tracer) for x in (*closed.consts, *leaves)):
        text = str(jaxpr)
        run = _kept(owner, text, parts if opaque or "callback" in text else None, run)
    return jax.tree.unflatten(jax.tree.structure(shape), run(closed.consts, leaves))


def _kept(owner: object, text: str, parts: Hashable, run: Run) -> Run:
    """The program kept for this text and these parts, or ``run`` if there is none."""
    if "[...]" in text:  # an array whose values are not in the text
        return run
    try:
        # Each access to a bound method makes a new object, but its __self__ is the same.
        programs = _PROGRAMS.setdefault(getattr(owner, "__self__", owner), {})
        run = programs.setdefault((getattr(owner, "__func__", None), text, parts), run)
    except TypeError:  # no hash, or no weak references
        return run
    if len(programs) > _KEPT:
        del programs[next(iter(programs))]
    return run
