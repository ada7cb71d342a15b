"""Local training: an outer optimizer on the displacement of H inner steps of each worker."""

from collections.abc import Callable

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
from nag_jax._types import (
    ArrayLike,
    AxisName,
    DTypeLike,
    OptState,
    Params,
    PyTree,
    Scalar,
    Tree,
    Updates,
    transformation,
)
from nag_jax.methods._fragments import (
    Meeting,
    check_rounds,
    due_fragments,
    joined,
    merged,
    numbered,
    parts,
)
from nag_jax.methods._host import check_memory_kind, on_device, on_host
from nag_jax.methods._outer_state import Fragment, OuterState, Sent, alike, assembled, split
from nag_jax.methods._workers import check_workers, given_weight, mean_of_workers
from nag_jax.methods.communication import start


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

    Between sites the options of Streaming DiLoCo lower the peak of what is sent, and the wait:

    * ``fragments``: the parameters are divided into P groups of successive leaves of similar size.
      Fragment p, from 0, is sent in the steps :math:`t_p = \lfloor (p+1)H/P \rfloor`,
      :math:`t_p + H`, ... Each has its own slow copy, its own state of the outer optimizer and its
      own collective.
    * ``delay``: a displacement is sent :math:`\tau` steps before the outer step that uses it. If
      these steps are compiled as one program, they hide the network. In the outer step a worker
      keeps the share :math:`\alpha` of its own parameters (``mixing``), and with it of what it
      learned meanwhile: :math:`\theta_i' = \alpha \theta_i + (1 - \alpha) \theta'`.
    * ``send_dtype``: displacements are rounded stochastically before they are sent, and each worker
      adds its rounding error to its next displacement (error feedback).
    * ``weighted``: the mean is :math:`\sum_i w_i (\theta - \theta_i) / \sum_i w_i`, and ``update``
      takes :math:`w_i` as ``weight=``, a scalar of at least 0, by default 1. A worker of weight 0
      contributes nothing, even if its parameters are not finite, and receives the slow copy as the
      others do (its parameters become finite again only by :func:`resynchronize`). If all weights
      are 0, the slow copy remains as it is and ``state.skipped`` counts one more. The weight counts
      in the step that sends. Whether a traced weight is negative is not checked.
    * ``memory_kind``: what only outer steps need is in the memory of the host.

    With fragments or a delay, ``sync`` is what :func:`nag_jax.meeting` returns for the step.

    A step with ``sync=False`` moves as much memory as a step of ``inner`` alone. Where it is known
    only at run time whether a step is the last of its round, it also reads the slow copy, and a
    last step computes the update of ``inner`` twice: what a branch is given, XLA would keep in
    memory at every step.

    The slow copy and the state of the outer optimizer are bit for bit the same on all workers.
    Params may differ in the last bit after an outer step, since the addition of an update is
    rounded; :func:`resynchronize` corrects this.

    Args:
      inner: the optimizer of each worker, including its learning rate. It receives all extra
        arguments of ``update`` except ``sync`` and ``weight``.
      outer_optimizer: any gradient transformation, for the gradient :math:`\Delta`; its schedules
        count outer steps, with fragments those of each fragment.
      every: H, the number of inner steps per outer step, at least 1.
      axis_name: inside ``shard_map``, ``pmap`` or ``vmap``, the axis or axes of the workers, which
        have different params and states (rows of a stack); None: one worker.
      slow_dtype: floating or complex dtype of the slow copy, and therefore of the buffers of the
        outer optimizer; None: that of each parameter. With bfloat16 params float32 preserves what
        an outer step would lose to rounding; a narrower dtype rounds the model at each outer step.
        Complex parameters keep a complex copy of at least that precision, real ones a real copy.
      fragments: P, from 1 to H and to the number of arrays in params. The largest fragment is as
        small as the order of the leaves allows.
      delay: tau, the number of inner steps between sending and the outer step, from 0 to H - 1.
      mixing: alpha in [0, 1], the share of its own parameters that a worker keeps in an outer step;
        0.5 in the paper where there is a delay. A worker of weight 0 keeps nothing.
      weighted: whether ``update`` takes ``weight``; needs axis_name.
      memory_kind: ``"pinned_host"`` keeps the slow copy, the buffers of the outer optimizer and
        delayed displacements there, None on the device. It needs ``sync`` to be known when the
        step is compiled, since other steps must not touch these arrays. Call
        :func:`resynchronize` and ``eval_params`` only after outer steps.
      send_dtype: ``jnp.bfloat16``, ``jnp.int8`` or ``jnp.int4`` (with one scale for each row of a
        leaf); None: float32, or float64 where parameters are. Needs axis_name. The state then
        holds one more float32 tree for each worker.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Its state,
      :class:`OuterState`, holds a copy of params and both optimizers' states, and with a delay one
      float32 tree of displacements.

    Raises:
      ValueError: for numbers out of range, a dtype or memory that is not listed, an inner or
        outer_optimizer that is not a gradient transformation, or an option that needs axis_name;
        from init, if a parameter is neither floating-point nor complex, there are fewer arrays
        than fragments, or the device cannot use the host's memory; from update, without params,
        for a ``sync`` of other fragments, or a weight that is negative or not a scalar.

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

      Four fragments in eight steps, each used one step after it is sent:

      >>> optimizer = nag_jax.outer(
      ...     optax.sgd(0.1), nag_jax.nag(0.7, 0.9), every=8, fragments=4, delay=1, mixing=0.5
      ... )
      >>> params = {name: jnp.ones(3) for name in "abcd"}
      >>> state = optimizer.init(params)
      >>> for step in range(1, 4):
      ...     sync = nag_jax.meeting(step, every=8, fragments=4, delay=1)
      ...     updates, state = optimizer.update(params, state, params, sync=sync)
      ...     params = optax.apply_updates(params, updates)
      >>> print(state.slow["a"], state.slow["b"])
      [0.7473 0.7473 0.7473] [1. 1. 1.]

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead optimizer: k steps forward, 1 step back, 2019,
      arXiv:1907.08610. Douillard et al., DiLoCo: distributed low-communication training of language
      models, 2023, arXiv:2311.08105, algorithm 1. Kallusky, Rao, Nandavanam, Shi, SNOO: step-K
      Nesterov outer optimizer, 2025, arXiv:2510.15830. Therien et al., MuLoCo: Muon is a practical
      inner optimizer for DiLoCo, 2025, arXiv:2505.23725. Douillard et al., Streaming DiLoCo with
      overlapping communication, 2025, arXiv:2501.18512, algorithm 2.
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
                sent = jax.tree.map(alike, sent, old.sent)
            return sent, jax.tree.map(alike, feedback, old.feedback)

        def apply(sent: Sent, old: Fragment) -> tuple[Params, OptState, PyTree]:
            mean, slow, outer_state = on_device((sent.mean, old.slow, old.outer))
            moves, new_state = outer_optimizer.update(mean, outer_state, slow)
            new = _moved(slow, moves), jax.tree.map(alike, new_state, outer_state)
            if not weighted:
                return *new, old.skipped
            anyone = sent.total > 0
            new = jax.tree.map(lambda x, old: jnp.where(anyone, x, old), new, (slow, outer_state))
            count = lambda n: alike(jnp.where(anyone, n, optax.safe_increment(n)), n)
            return *new, jax.tree.map(count, old.skipped)

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
        kept = (
            jnp.where(weight > 0, mixing, 0.0) if mixing and weight is not None else float(mixing)
        )
        moved, new, skipped = [], [], state.skipped
        for p, old in enumerate(split(state, numbers, fragments)):
            u, fragment = outer_step(p, old._replace(skipped=skipped))
            moved, new, skipped = [*moved, u], [*new, fragment], fragment.skipped
        steps = jnp.where(due[-1].applies, delay, steps)
        return merged(moved), assembled(state, inner_state, steps, new, due, exact=mixing == 0)

    return transformation(init, update)


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
        map_gradients(lambda move, s: alike(mix(1.0, s, 1.0, move), s), moves, slow), slow
    )


def _update_to(slow: Params, updates: Updates, params: Params, kept: Scalar) -> Updates:
    """The update that brings ``params`` to the slow copy, in the dtypes of ``updates``.

    With ``kept`` above 0 it is this share of the way from the slow copy to where ``updates`` lead.
    """

    def update(u: jax.Array, p: jax.Array, s: jax.Array) -> jax.Array:
        target = wide(s.astype(dtype_of(p)))
        if not (isinstance(kept, float) and kept == 0):
            target = mix(kept, wide(p) + wide(u), 1 - kept, target)
        return alike(target - wide(p), u)

    return map_gradients(update, updates, params, slow)
