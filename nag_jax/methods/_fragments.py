"""Which part of the parameters meets at which step, for ``outer``."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from jax.core import Tracer

from nag_jax._arithmetic import map_gradients
from nag_jax._checks import check_count
from nag_jax._types import PyTree, Tree


class Meeting(NamedTuple):
    """What a step of :func:`outer` does after the inner step; see :func:`meeting`."""

    sends: int | None  # the fragment whose displacement is averaged over the workers
    applies: int | None  # the fragment that takes its outer step


def meeting(step: int, *, every: int, fragments: int = 1, delay: int = 0) -> Meeting:
    r"""Returns what a step of :func:`outer` does, for the argument ``sync`` of its update.

    The displacement of fragment p is sent in the steps :math:`t_p, t_p + H, t_p + 2H, \ldots` with
    :math:`t_p = \lfloor (p + 1) H / P \rfloor`. The outer step follows :math:`\tau` steps later.

    Args:
      step: the number of the inner step, at least 1 and known while tracing.
      every: H, as given to :func:`outer`.
      fragments: P, as given to :func:`outer`.
      delay: tau, as given to :func:`outer`.

    Returns:
      A ``Meeting(sends, applies)``: the fragment that is sent and the one that takes its outer
      step, each None if there is none. It can be a static argument of ``jax.jit``, which then
      compiles one program for each pair.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> for step in range(1, 9):
      ...     sends, applies = nag_jax.meeting(step, every=4, fragments=2, delay=1)
      ...     print(step, sends, applies)
      1 None None
      2 0 None
      3 None 0
      4 1 None
      5 None 1
      6 0 None
      7 None 0
      8 1 None
    """
    check_count("step", step, static=True)
    check_rounds(every, fragments, delay)

    def due(step: int) -> int | None:
        for p in range(fragments):
            first = _first_step(p, every, fragments)
            if step >= first and (step - first) % every == 0:
                return p
        return None

    return Meeting(due(step), due(step - delay))


def _first_step(fragment: int, every: int, fragments: int) -> int:
    """The first step in which a fragment is sent; ``every`` for the last one."""
    return (fragment + 1) * every // fragments


def check_rounds(every: int, fragments: int, delay: int) -> None:
    """Raises ValueError for numbers that make no rounds."""
    check_count("every", every, static=True)
    check_count("fragments", fragments, static=True)
    check_count("delay", delay, 0, static=True)
    if fragments > every:
        raise ValueError(
            f"fragments must be at most every, {every}, got {fragments}; a step sends at most one"
        )
    if delay >= every:
        raise ValueError(
            f"delay must be less than every, {every}, got {delay}; a displacement is used before "
            "the next one is sent"
        )


class Due(NamedTuple):
    """What a step does for one fragment; Python bools where that is known while tracing."""

    sends: bool | jax.Array
    applies: bool | jax.Array


def due_fragments(
    sync: bool | jax.Array | Meeting | None,
    steps: jax.Array,
    every: int,
    fragments: int,
    delay: int,
) -> list[Due]:
    """What a step does for each fragment, by ``sync`` or else by its place in the round.

    ``steps`` counts from 1 to every + delay and continues from delay + 1, so that nothing is due
    in the first steps of training that would have to be sent before.
    """
    if sync is None:
        due = []
        for p in range(fragments):
            first = _first_step(p, every, fragments)
            if every == 1:
                applies = True
            elif p == fragments - 1:
                applies = steps >= every + delay
            else:
                applies = steps == first + delay
            sends = (steps == first) | (steps == first + every) if delay else applies
            due.append(Due(sends, applies))
        return due
    if not isinstance(sync, Meeting):
        if (fragments > 1 or delay) and (isinstance(sync, Tracer) or sync):
            raise ValueError(
                "sync must be False or what nag_jax.meeting returns, with fragments or a delay, "
                f"got {sync!r}"
            )
        return [Due(sync, sync)] * fragments
    allowed = (None, *range(fragments))
    if not all(p in allowed for p in sync) or (delay == 0 and sync.sends != sync.applies):
        raise ValueError(
            f"sync must come from nag_jax.meeting with the same fragments={fragments} and "
            f"delay={delay}, got {sync}"
        )
    return [Due(p == sync.sends, p == sync.applies) for p in range(fragments)]


def numbered(tree: PyTree, fragments: int) -> PyTree:
    """The fragment of each leaf: successive leaves, the largest fragment as small as possible."""
    leaves, structure = jax.tree.flatten(tree)
    if fragments == 1:
        return jax.tree.unflatten(structure, [0] * len(leaves))
    if fragments > len(leaves):
        raise ValueError(
            f"fragments must be at most the number of arrays in params, {len(leaves)}, got "
            f"{fragments}"
        )
    sizes = [leaf.size for leaf in leaves]
    fits = lambda most: _grouped(sizes, most, fragments)[-1] < fragments
    most = bisect.bisect_left(range(sum(sizes)), True, lo=max(sizes), key=fits)
    return jax.tree.unflatten(structure, _grouped(sizes, most, fragments))


def _grouped(sizes: Sequence[int], most: int, groups: int) -> list[int]:
    """The group of each size, for sums of at most ``most`` and at least ``groups`` groups."""
    numbers, total = [0] * len(sizes), 0
    for i in range(1, len(sizes)):
        total += sizes[i - 1]
        alone = len(sizes) - i < groups - numbers[i - 1]  # as many leaves as groups are left
        opens = alone or total + sizes[i] > most
        numbers[i] = numbers[i - 1] + opens
        total = 0 if opens else total
    return numbers


def parts(tree: Tree, numbers: PyTree, fragments: int) -> list[Tree]:
    """The fragments of a tree, each with None at the leaves of the others."""
    if fragments == 1:
        return [tree]

    def part(fragment: int) -> Tree:
        def pick(x: PyTree, number: int) -> PyTree:
            return x if number == fragment else None

        return map_gradients(pick, tree, numbers)

    return [part(p) for p in range(fragments)]


def merged(trees: Sequence[Tree]) -> Tree:
    """The tree of which these are the :func:`parts`."""
    given = lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None)
    return jax.tree.map(given, *trees, is_leaf=lambda node: node is None)


def joined(states: Sequence[PyTree]) -> PyTree:
    """One state of the states of all fragments, in which ``eval_params`` finds each of them."""
    if len(states) == 1:
        return states[0]
    return optax.PartitionState({str(p): state for p, state in enumerate(states)})


def separated(state: PyTree, fragments: int) -> list[PyTree]:
    """The states of which ``state`` was :func:`joined`."""
    if fragments == 1:
        return [state]
    return [state.inner_states[str(p)] for p in range(fragments)]
