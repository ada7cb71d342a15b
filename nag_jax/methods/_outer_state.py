"""The state of ``outer``, and its parts that belong to each fragment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import varying_axes
from nag_jax._paths import only_scalar
from nag_jax._types import ArrayLike, OptState, Params, PyTree, Updates
from nag_jax.evaluation import evaluated
from nag_jax.methods._fragments import Due, joined, merged, parts, separated
from nag_jax.methods._host import beside, on_device


class Sent(NamedTuple):
    """A mean displacement between the step that sends it and the step that uses it."""

    mean: Updates  # like params, in at least float32
    total: PyTree  # if weighted the sum of the weights, shape=(fragments,), float32; otherwise ()


class OuterState(NamedTuple):
    """State of :func:`outer`; fields of options that are not used are ``()``."""

    inner: OptState  # of the inner optimizer; an outer step does not reset it
    slow: Params  # params at the last outer step, like params; their dtype, or slow_dtype
    outer: OptState  # of the outer optimizer; with fragments optax.PartitionState, of one for each
    steps: jax.Array  # inner steps since the round began, shape=(), int32
    sent: PyTree = ()  # a Sent, with a delay
    feedback: PyTree = ()  # with send_dtype, for each fragment: what this worker has not yet sent
    skipped: jax.Array | tuple[()] = ()  # rounds without a worker, shape=(), int32; if weighted
    met: jax.Array | tuple[()] = ()  # fragments whose params are the slow copy, shape=(P,), bool

    def iterate(self, params: Params) -> Params:
        """Returns the outer optimizer's iterate of the last outer step, for :func:`eval_params`."""
        del params
        only_scalar(self.steps)  # raises for a stack of states
        return evaluated(on_device(self.slow), on_device(self.outer))


class Fragment(NamedTuple):
    """The part of the state that belongs to one fragment; None at the leaves of others."""

    slow: Params
    outer: OptState
    sent: PyTree  # a Sent with a delay, otherwise ()
    feedback: PyTree
    skipped: jax.Array | tuple[()]  # of all fragments


def split(state: OuterState, numbers: PyTree, fragments: int) -> list[Fragment]:
    """The parts of a state that belong to the fragments."""
    slow = parts(state.slow, numbers, fragments)
    outer_states = separated(state.outer, fragments)
    sent, feedback = [()] * fragments, [()] * fragments
    if state.sent:
        means = parts(state.sent.mean, numbers, fragments)
        total = lambda p: jax.tree.map(lambda x: x[p], state.sent.total)
        sent = [Sent(mean, total(p)) for p, mean in enumerate(means)]
    if state.feedback:
        feedback = separated(state.feedback, fragments)
    return [
        Fragment(*of_one, state.skipped)
        for of_one in zip(slow, outer_states, sent, feedback, strict=True)
    ]


def assembled(
    old: OuterState,
    inner: OptState,
    steps: jax.Array,
    fragments: Sequence[Fragment],
    due: Sequence[Due],
    exact: bool,
) -> OuterState:
    """The state of these fragments, with the types and memories of the old one."""
    slow, outer_states, sent, feedback, skipped = zip(*fragments, strict=True)
    new = OuterState(inner, merged(slow), joined(outer_states), steps, skipped=skipped[-1])
    if old.sent:
        total = jax.tree.map(lambda *totals: jnp.stack(totals), *(one.total for one in sent))
        new = new._replace(sent=Sent(merged([one.mean for one in sent]), total))
    if old.feedback:
        new = new._replace(feedback=joined(feedback))
    if isinstance(old.met, jax.Array):
        new = new._replace(met=jnp.stack([jnp.asarray(of_one.applies) for of_one in due]) & exact)
    placed = lambda new, old: beside(alike(new, old), old)
    return new._replace(
        **{
            field: jax.tree.map(placed, getattr(new, field), getattr(old, field))
            for field in OuterState._fields
            if field != "inner"
        }
    )


def alike(new: ArrayLike, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old``, and varying over the same axes of a ``shard_map``."""
    new = jnp.asarray(new, old.dtype)
    missing = tuple(varying_axes(old) - varying_axes(new))
    if not missing:
        return new
    lax: Any = jax.lax  # pcast replaces pvary, which is the only one in jax 0.7
    if hasattr(lax, "pcast"):
        return lax.pcast(new, missing, to="varying")
    return lax.pvary(new, missing)
