"""Local training: an outer optimizer on the displacement of H inner steps of each worker."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._arithmetic import (
    as_arrays,
    copied,
    dtype_of,
    filled,
    map_gradients,
    mix,
    varying_axes,
    wide,
    wide_zeros,
)
from nag_jax._checks import (
    check_dtype,
    check_optimizer,
    check_range,
    check_trainable,
    given_params,
)
from nag_jax._paths import by_path, only_scalar
from nag_jax._types import (
    ArrayLike,
    AxisName,
    DTypeLike,
    KeyPath,
    OptState,
    Params,
    PyTree,
    Scalar,
    Tree,
    Updates,
    transformation,
)
from nag_jax.evaluation import evaluated
from nag_jax.methods._fragments import (
    Due,
    Meeting,
    check_rounds,
    due_fragments,
    joined,
    merged,
    numbered,
    parts,
    separated,
)
from nag_jax.methods._host import beside, check_memory_kind, on_device, on_host
from nag_jax.methods._workers import (
    check_workers,
    given_weight,
    mean_of_workers,
)
from nag_jax.methods.communication import FeedbackState, start


class Sent(NamedTuple):
    """A mean displacement between the step that sends it and the step that uses it."""

    mean: Updates  # like params, in at least float32
    total: jax.Array | tuple[()]  # of the weights of all workers, shape=(fragments,), float32


class OuterState(NamedTuple):
    """State of :func:`outer`; fields of options that are not used are ``()``."""

    inner: OptState  # of the inner optimizer; an outer step does not reset it
    slow: Params  # params at the last outer step, like params; their dtype, or slow_dtype
    outer: OptState  # of the outer optimizer; with fragments optax.PartitionState, of one for each
    steps: jax.Array  # inner steps in this round, shape=(), int32
    sent: Sent | tuple[()] = ()  # with a delay
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
    sent: Sent | tuple[()]
    feedback: FeedbackState | tuple[()]
    skipped: jax.Array | tuple[()]  # of all fragments


def outer(
    inner: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    *,
    every: int,
    axis_name: AxisName | None = None,
    slow_dtype: DTypeLike | None = None,
    fragments: int = 1,
    delay: int = 0,
    mixing: float = 0.0,
    weighted: bool = False,
    memory_kind: str | None = None,
    send_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies an outer optimizer to the displacement of every H steps of an inner one.

    Worker i starts a round at the slow copy :math:`\theta` and takes H steps of ``inner`` to
    :math:`\theta_i`. The update of each step H, 2H, ... includes the outer step

    .. math::
        \Delta = \theta - \frac{1}{K} \sum_{i=1}^{K} \theta_i, \qquad
        \theta' = \theta + \mathrm{outer}(\Delta), \qquad \theta_i' = \theta'

    Lookahead, SNOO, DiLoCo and MuLoCo are special cases: Lookahead has ``optax.sgd(0.5)`` as the
    outer optimizer, SNOO has ``nag(lr, momentum)`` on one worker, DiLoCo has it on several, and
    MuLoCo is DiLoCo with Muon as the inner optimizer. ``nag_jax.lookahead``, ``snoo`` and
    ``diloco`` have the defaults of the papers. Params are each worker's :math:`\theta_i`, a plain
    tree. The inner state is kept from round to round. ``eval_params`` is the outer optimizer's
    iterate of the last outer step, the same on all workers.

    Between outer steps nothing is communicated: the mean is in a branch that other steps do not
    take. If a run-time branch is unsuitable (under ``vmap`` both sides are computed), pass a Python
    bool, ``update(..., sync=True)`` or ``sync=False``. The compiled inner step then contains no
    collective, and ``every`` is ignored.

    A step with ``sync=False`` moves as much memory as a step of ``inner`` alone. Where it is known
    only at run time whether a step is the last of its round, it also reads the slow copy, and a
    last step computes the update of ``inner`` twice: what a branch is given, XLA would keep in
    memory at every step.

    The state is bit for bit the same on all workers. Params may differ in the last bit after an
    outer step, since the addition of an update is rounded; :func:`resynchronize` corrects this.

    Args:
      inner: the optimizer of each worker, including its learning rate. It receives all extra
        arguments of ``update`` except ``sync``.
      outer_optimizer: any gradient transformation, for the gradient :math:`\Delta`; its schedules
        count outer steps.
      every: H, the number of inner steps per outer step, at least 1.
      axis_name: inside ``shard_map``, ``pmap`` or ``vmap``, the axis or axes of the workers, which
        have different params and states (rows of a stack); None: one worker.
      slow_dtype: floating or complex dtype of the slow copy, and therefore of the buffers of the
        outer optimizer; None: that of each parameter. With bfloat16 params float32 preserves what
        an outer step would lose to rounding; a narrower dtype rounds the model at each outer step.
        Complex parameters keep a complex copy of at least that precision, real ones a real copy.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Its state holds a
      copy of params and both optimizers' states.

    Raises:
      ValueError: if every is below 1, slow_dtype is neither a floating nor a complex dtype, or
        inner or outer_optimizer is not a gradient transformation; from init, if a parameter is
        neither floating-point nor complex; from update, without params.

    Example:
      In a narrow valley gradient descent is slow along the flat direction. An outer step after
      every 10 of its steps accelerates it:

      >>> curvature, steps = jnp.array([1.0, 0.001]), 300
      >>> descent = optax.sgd(1.0)
      >>> snoo = nag_jax.outer(descent, nag_jax.nag(1.0, 0.9), every=10)
      >>> for name, optimizer in {"descent": descent, "with nag outside": snoo}.items():
      ...     def step(carry, _):
      ...         updates, state = optimizer.update(curvature * carry[0], carry[1], carry[0])
      ...         return (optax.apply_updates(carry[0], updates), state), None
      ...     start = jnp.ones(2)
      ...     (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
      ...     print(f"{name:16} {jnp.sum(curvature * params**2) / 2:.0e}")
      descent          3e-04
      with nag outside 5e-06

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead optimizer: k steps forward, 1 step back, 2019,
      arXiv:1907.08610. Douillard et al., DiLoCo: distributed low-communication training of language
      models, 2023, arXiv:2311.08105, algorithm 1. Kallusky, Rao, Nandavanam, Shi, SNOO: step-K
      Nesterov outer optimizer, 2025, arXiv:2510.15830. Therien et al., MuLoCo: Muon is a practical
      inner optimizer for DiLoCo, 2025, arXiv:2505.23725.
    """
    check_optimizer("inner", inner)
    check_optimizer("outer_optimizer", outer_optimizer)
    check_rounds(every, fragments, delay)
    check_range("mixing", mixing, 0.0, 1.0, high_closed=True, static=True)
    check_dtype("slow_dtype", slow_dtype)
    check_memory_kind(memory_kind)
    check_workers(axis_name, weighted, send_dtype)
    inner = optax.with_extra_args_support(inner)
    outer_optimizer = optax.with_extra_args_support(outer_optimizer)

    def init(params: Params) -> OuterState:
        check_trainable("the outer step", params)
        slow = copied(params, slow_dtype)
        numbers = numbered(slow, fragments)
        outer_state = joined(
            [outer_optimizer.init(part) for part in parts(slow, numbers, fragments)]
        )
        mean = wide_zeros(params) if delay else ()
        if memory_kind is not None:
            slow, outer_state, mean = on_host((slow, outer_state, mean))
        feedback = ()
        if send_dtype is not None:
            feedback = joined([start(part) for part in parts(params, numbers, fragments)])
        total = jnp.zeros([fragments]) if weighted else ()
        return OuterState(
            inner.init(params),
            slow,
            outer_state,
            jnp.zeros([], jnp.int32),
            Sent(mean, total) if delay else (),
            feedback,
            skipped=jnp.zeros([], jnp.int32) if weighted else (),
            met=jnp.zeros([fragments], bool) if fragments > 1 or delay or mixing else (),
        )

    def update(
        updates: Updates,
        state: OuterState,
        params: Params | None = None,
        *,
        sync: bool | jax.Array | Meeting | None = None,
        weight: ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[Updates, OuterState]:
        params, state = given_params("outer", params), as_arrays(state)
        weight = given_weight(weight, weighted)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        due = due_fragments(sync, steps, every, fragments, delay)
        if memory_kind is not None and any(isinstance(x, Tracer) for pair in due for x in pair):
            raise ValueError(
                f"memory_kind={memory_kind!r} needs a step that is compiled for what it does; pass "
                "sync, a Python bool or what nag_jax.meeting returns, as a static argument"
            )
        numbers = numbered(state.slow, fragments)

        def inner_step() -> tuple[list[Updates], OptState]:
            proposed, inner_state = inner.update(updates, state.inner, params, **extra_args)
            # The update of a Python number may be one.
            return parts(jax.tree.map(jnp.asarray, proposed), numbers, fragments), inner_state

        proposed, inner_state = inner_step()

        def send(p: int, old: Fragment) -> tuple[Sent, PyTree]:
            # XLA keeps in memory, at every step, what goes into a branch or comes out of it. So a
            # branch computes the inner update again, and the choice between updates is outside.
            u = (inner_step()[0] if isinstance(due[p].sends, Tracer) else proposed)[p]
            difference = _displacement(u, params, on_device(old.slow))
            mean, total, feedback = mean_of_workers(
                difference, axis_name, weight, send_dtype, old.feedback
            )
            sent = Sent(mean, total)
            if delay:
                sent = Sent(filled(mean, old.sent.mean), total)
                sent = jax.tree.map(_like, sent, old.sent)
            return sent, jax.tree.map(_like, feedback, old.feedback)

        def apply(sent: Sent, old: Fragment) -> tuple[Params, OptState, PyTree]:
            mean, slow, outer_state = on_device((sent.mean, old.slow, old.outer))
            moves, new_state = outer_optimizer.update(mean, outer_state, slow)
            new = _moved(slow, moves), jax.tree.map(_like, new_state, outer_state)
            if not weighted:
                return *new, old.skipped
            anyone = sent.total > 0
            new = jax.tree.map(lambda x, old: jnp.where(anyone, x, old), new, (slow, outer_state))
            return *new, jax.tree.map(lambda n: _like(n + ~anyone, n), old.skipped)

        def outer_step(p: int, old: Fragment) -> tuple[Updates, Fragment]:
            sends, applies = due[p]
            slow, outer_state, sent, feedback, skipped = old
            if delay:
                sent, feedback = _branch(sends, lambda: send(p, old), (sent, feedback))
                slow, outer_state, skipped = _branch(
                    applies, lambda: apply(old.sent, old), (slow, outer_state, skipped)
                )
            else:

                def meet() -> tuple[PyTree, ...]:
                    sent, feedback = send(p, old)
                    return *apply(sent, old), feedback

                slow, outer_state, skipped, feedback = _branch(
                    applies, meet, (slow, outer_state, skipped, feedback)
                )
            u = proposed[p]
            if isinstance(applies, Tracer):
                choose = lambda moved, u: jnp.where(applies, moved, u)
                u = map_gradients(choose, _update_to(slow, u, params, kept), u)
            elif applies:
                u = _update_to(slow, u, params, kept)
            return u, Fragment(slow, outer_state, sent, feedback, skipped)

        # The share of its own params that a worker keeps in an outer step.
        kept = jnp.where(weight > 0, mixing, 0.0) if mixing and weighted else float(mixing)
        moved, new, skipped = [], [], state.skipped
        for p, old in enumerate(_split(state, numbers, fragments)):
            u, fragment = outer_step(p, old._replace(skipped=skipped))
            moved, new, skipped = [*moved, u], [*new, fragment], fragment.skipped
        steps = jnp.where(due[-1].applies, delay, steps)
        return merged(moved), _assembled(state, inner_state, steps, new, due, exact=mixing == 0)

    return transformation(init, update)


def _split(state: OuterState, numbers: PyTree, fragments: int) -> list[Fragment]:
    slow = parts(state.slow, numbers, fragments)
    outer_states = separated(state.outer, fragments)
    sent, feedback = [()] * fragments, [()] * fragments
    if isinstance(state.sent, Sent):
        means = parts(state.sent.mean, numbers, fragments)
        total = lambda p: jax.tree.map(lambda x: x[p], state.sent.total)
        sent = [Sent(mean, total(p)) for p, mean in enumerate(means)]
    if isinstance(state.feedback, FeedbackState | optax.PartitionState):
        feedback = separated(state.feedback, fragments)
    return [
        Fragment(*of_one, state.skipped)
        for of_one in zip(slow, outer_states, sent, feedback, strict=True)
    ]


def _assembled(
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
    if isinstance(old.sent, Sent):
        total = jax.tree.map(lambda *totals: jnp.stack(totals), *(one.total for one in sent))
        new = new._replace(sent=Sent(merged([one.mean for one in sent]), total))
    if isinstance(old.feedback, FeedbackState | optax.PartitionState):
        new = new._replace(feedback=joined(feedback))
    if isinstance(old.met, jax.Array):
        new = new._replace(met=jnp.stack([jnp.asarray(of_one.applies) for of_one in due]) & exact)
    placed = lambda new, old: beside(_like(new, old), old)
    return new._replace(
        **{
            field: jax.tree.map(placed, getattr(new, field), getattr(old, field))
            for field in OuterState._fields
            if field != "inner"
        }
    )


def _branch(due: bool | jax.Array, work: Callable[[], Tree], old: Tree) -> Tree:
    """``work()`` if it is due, otherwise ``old``."""
    if isinstance(due, Tracer):
        return jax.lax.cond(due, work, lambda: old)
    return work() if due else old  # outside of jit, where lax.cond would be compiled at every call


def _displacement(updates: Updates, params: Params, slow: Params) -> Updates:
    """From this worker's params after ``updates`` back to the slow copy."""
    # The inner steps began at the slow copy in the dtype of params. What that rounded off is not a
    # displacement and must not enter the outer momentum.
    return map_gradients(
        lambda u, p, s: wide(s.astype(dtype_of(p))) - (wide(p) + wide(u)), updates, params, slow
    )


def _moved(slow: Params, moves: Updates) -> Params:
    """The slow copy after the outer step; unchanged where ``moves`` have None."""
    return filled(
        map_gradients(lambda move, s: _like(mix(1.0, s, 1.0, move), s), moves, slow), slow
    )


def _update_to(slow: Params, updates: Updates, params: Params, kept: Scalar) -> Updates:
    """The update that brings ``params`` to the slow copy, in the dtypes of ``updates``.

    With ``kept`` above 0 it is this share of the way from the slow copy to where ``updates`` lead.
    """

    def update(u: jax.Array, p: jax.Array, s: jax.Array) -> jax.Array:
        target = wide(s.astype(dtype_of(p)))
        if not (isinstance(kept, float) and kept == 0):
            target = mix(kept, wide(p) + wide(u), 1 - kept, target)
        return _like(target - wide(p), u)

    return map_gradients(update, updates, params, slow)


def resynchronize(params: PyTree, opt_state: OptState) -> PyTree:
    """Removes the rounding error that params have after an outer step of :func:`outer`.

    Call it after ``optax.apply_updates`` if params must be bit for bit the same on all workers.

    Args:
      params: the parameters as trained with :func:`outer`, any pytree.
      opt_state: the state of the same step, of :func:`outer` or of a chain that contains it.

    Returns:
      A pytree like params, with the same shapes and dtypes. Directly after an outer step it is the
      slow copy, otherwise params unchanged.

    Raises:
      ValueError: if opt_state does not contain a state of ``outer``.

    Example:
      >>> optimizer = nag_jax.lookahead(optax.sgd(0.3), every=1)
      >>> params = jnp.array([0.1])
      >>> updates, state = optimizer.update(jnp.array([0.7]), optimizer.init(params), params)
      >>> params = nag_jax.resynchronize(optax.apply_updates(params, updates), state)
      >>> bool(params == state.slow)
      True
    """
    is_outer = lambda node: isinstance(node, OuterState)
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_outer) if is_outer(s)]
    if not states:
        raise ValueError(
            f"opt_state holds no state of nag_jax.outer, got {jax.tree.structure(opt_state)}; pass "
            "what optimizer.init(params) returned"
        )
    # More than one where groups of parameters have their own optimizers.
    for state in states:
        params = _resynchronized(params, state)
    return params


def _resynchronized(params: PyTree, state: OuterState) -> PyTree:
    # Scalars may be in flax variables.
    (steps,) = jax.tree.leaves(state.steps)
    (met,) = jax.tree.leaves(state.met) or [jnp.reshape(steps == 0, [1])]
    slow = by_path(on_device(state.slow))
    fragment = by_path(numbered(state.slow, len(met)))

    def exact(path: KeyPath, p: jax.Array) -> jax.Array:
        if path not in slow:
            return p
        # A select, since under jit it is not known whether this step was an outer step.
        return jnp.where(met[fragment[path]], slow[path].astype(dtype_of(p)), p)

    return jax.tree_util.tree_map_with_path(exact, params)


def _like(new: ArrayLike, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old``, and varying over the same axes of a ``shard_map``."""
    new = jnp.asarray(new, old.dtype)
    missing = tuple(varying_axes(old) - varying_axes(new))
    if not missing:
        return new
    lax: Any = jax.lax  # pcast replaces pvary, which is the only one in jax 0.7
    if hasattr(lax, "pcast"):
        return lax.pcast(new, missing, to="varying")
    return lax.pvary(new, missing)
