"""Programs that stay compiled from one call outside of ``jax.jit`` to the next."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer, eval_jaxpr

_PROGRAMS: Any = weakref.WeakKeyDictionary()  # of each function, by their text
_KEPT = 8  # programs of one function


def compiled(
    program: Callable[[Any], Any], argument: Any, *, owner: Any, parts: Hashable, opaque: bool
) -> Any:
    """``program(argument)`` in one piece, compiled only if it is another than for this ``owner``.

    It is traced at each call, so it is right where what it closes over has changed: arrays become
    arguments of the compiled program, and all else is in its text. But callbacks and rules for
    derivatives are not: with these, or if ``opaque``, the ``parts`` have to be the same, too.

    A compiled program is dropped with its owner, and holds none of the arrays.
    """
    leaves, structure = jax.tree.flatten(argument)
    flat = lambda *leaves: program(jax.tree.unflatten(structure, leaves))
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr = closed.jaxpr
    run = jax.jit(lambda data, leaves: eval_jaxpr(jaxpr, data, *leaves))
    if not any(isinstance(x, Tracer) for x in (*closed.consts, *leaves)):
        text = str(jaxpr)
        run = _kept(owner, (text, parts if opaque or "callback" in text else None), run)
    return jax.tree.unflatten(jax.tree.structure(shape), run(closed.consts, leaves))


def _kept(owner: Any, key: tuple[str, Hashable], run: Any) -> Any:
    """The program kept under ``key``, or ``run`` if there is none."""
    if "[...]" in key[0]:  # an array whose values are not in the text
        return run
    try:
        # A bound method is made anew at each access; what it is bound to stays.
        programs = _PROGRAMS.setdefault(getattr(owner, "__self__", owner), {})
        run = programs.setdefault((getattr(owner, "__func__", None), *key), run)
    except TypeError:  # no hash, or no weak references
        return run
    if len(programs) > _KEPT:
        del programs[next(iter(programs))]
    return run
