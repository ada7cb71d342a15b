"""Local training: an outer optimizer on the displacement of H inner steps of each worker."""

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
)
from nag_jax._checks import (
    check_count,
    check_dtype,
    check_optimizer,
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
    Updates,
    transformation,
)
from nag_jax.evaluation import evaluated


class OuterState(NamedTuple):
    """State of :func:`outer`."""

    inner: OptState  # of the inner optimizer; an outer step does not reset it
    slow: Params  # params at the last outer step, like params; their dtype, or slow_dtype
    outer: OptState  # of the outer optimizer
    steps: jax.Array  # inner steps since the last outer step, shape=(), int32

    def iterate(self, params: Params) -> Params:
        """Returns the outer optimizer's iterate of the last outer step, for :func:`eval_params`."""
        del params
        only_scalar(self.steps)  # raises for a stack of states
        return evaluated(self.slow, self.outer)


def outer(
    inner: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    *,
    every: int,
    axis_name: AxisName | None = None,
    slow_dtype: DTypeLike | None = None,
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
    check_count("every", every, static=True)
    check_dtype("slow_dtype", slow_dtype)
    inner = optax.with_extra_args_support(inner)
    outer_optimizer = optax.with_extra_args_support(outer_optimizer)

    def init(params: Params) -> OuterState:
        check_trainable("the outer step", params)
        slow = copied(params, slow_dtype)
        start = jnp.zeros([], jnp.int32)
        return OuterState(inner.init(params), slow, outer_optimizer.init(slow), start)

    def update(
        updates: Updates,
        state: OuterState,
        params: Params | None = None,
        *,
        sync: bool | jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[Updates, OuterState]:
        params, state = given_params("outer", params), as_arrays(state)

        def inner_step() -> tuple[Updates, OptState]:
            proposed, inner_state = inner.update(updates, state.inner, params, **extra_args)
            # The update of a Python number may be one.
            return jax.tree.map(jnp.asarray, proposed), inner_state

        def outer_step(proposed: Updates) -> tuple[Params, OptState]:
            gradient = _displacement(proposed, params, state.slow, axis_name)
            moves, new_state = outer_optimizer.update(gradient, state.outer, state.slow)
            return _moved(state.slow, moves), jax.tree.map(_like, new_state, state.outer)

        proposed, inner_state = inner_step()
        steps = jnp.asarray(optax.safe_increment(state.steps))

        due = sync if sync is not None else True if every == 1 else steps >= every
        slow, outer_state = state.slow, state.outer
        if isinstance(due, Tracer):
            # XLA keeps in memory, at every step, what goes into a branch or comes out of it. So the
            # branch computes the inner update again, and the choice between updates is outside.
            slow, outer_state = jax.lax.cond(
                due, lambda: outer_step(inner_step()[0]), lambda: (state.slow, state.outer)
            )
            choose = lambda moved, u: jnp.where(due, moved, u)
            proposed = map_gradients(choose, _update_to(slow, proposed, params), proposed)
        elif due:  # outside of jit, where lax.cond would be compiled at every call
            slow, outer_state = outer_step(proposed)
            proposed = _update_to(slow, proposed, params)
        steps = _like(jnp.where(due, 0, steps), state.steps)
        return proposed, OuterState(inner_state, slow, outer_state, steps)

    return transformation(init, update)


def _displacement(
    updates: Updates, params: Params, slow: Params, axis_name: AxisName | None
) -> Updates:
    """From the mean of the workers' params after ``updates`` back to the start of the round."""
    # The inner steps began at the slow copy in the dtype of params. What that rounded off is not a
    # displacement and must not enter the outer momentum.
    difference = map_gradients(
        lambda u, p, s: wide(s.astype(dtype_of(p))) - (wide(p) + wide(u)), updates, params, slow
    )
    return difference if axis_name is None else jax.lax.pmean(difference, axis_name)


def _moved(slow: Params, moves: Updates) -> Params:
    """The slow copy after the outer step; unchanged where ``moves`` have None."""
    return filled(
        map_gradients(lambda move, s: _like(mix(1.0, s, 1.0, move), s), moves, slow), slow
    )


def _update_to(slow: Params, updates: Updates, params: Params) -> Updates:
    """The update that brings ``params`` to the slow copy, in the dtypes of ``updates``."""
    return map_gradients(
        lambda u, p, s: _like(wide(s.astype(dtype_of(p))) - wide(p), u), updates, params, slow
    )


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
    (steps,) = jax.tree.leaves(state.steps)  # which may be in a flax variable
    slow = by_path(state.slow)

    def exact(path: KeyPath, p: jax.Array) -> jax.Array:
        if path not in slow:
            return p
        # A select, since under jit it is not known whether this step was an outer step.
        return jnp.where(steps == 0, slow[path].astype(dtype_of(p)), p)

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
