"""Local training: an outer optimizer on the displacement of H inner steps of many workers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax._arithmetic import (
    as_arrays,
    buffer_dtype,
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
from nag_jax._paths import only_scalar
from nag_jax.evaluation import evaluated


class OuterState(NamedTuple):
    """State of :func:`outer`."""

    inner: Any  # of the inner optimizer; kept over outer steps
    slow: optax.Params  # where the round began, like params; their dtype, or slow_dtype
    outer: Any  # of the outer optimizer
    steps: jax.Array  # inner steps since the last outer step, shape=(), int32

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns the outer optimizer's iterate of the last outer step, for :func:`eval_params`."""
        del params
        only_scalar(self.steps)
        return evaluated(self.slow, self.outer)


def outer(
    inner: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    *,
    every: int,
    axis_name: Any = None,
    slow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An outer optimizer whose gradient is the displacement of H steps of an inner one.

    Worker i starts a round at the slow copy :math:`\theta` and takes H steps of ``inner`` to
    :math:`\theta_i`. Then, as part of the update of step H, 2H, ... and not before,

    .. math::
        \Delta = \theta - \frac{1}{K} \sum_{i=1}^{K} \theta_i, \qquad
        \theta' = \theta + \mathrm{outer}(\Delta), \qquad \theta_i' = \theta'

    One transformation has four names: with ``optax.sgd(0.5)`` as the outer optimizer it is
    Lookahead, with ``nag(lr, momentum)`` on one worker SNOO, on many DiLoCo, and with Muon inside
    MuLoCo (``nag_jax.lookahead``, ``snoo`` and ``diloco`` have the defaults of the papers). Params
    are the worker's own :math:`\theta_i`, a plain tree; the inner state is kept over rounds.
    ``eval_params`` is the outer iterate of the last outer step, the same on all workers.

    Between two outer steps nothing is communicated: the mean is in a branch that other steps do not
    take. Where a branch will not do (under ``vmap`` it is a select, which computes both sides), say
    which step it is with a Python bool, ``update(..., sync=False)`` or ``sync=True``: then the
    program of an inner step has no collective in it at all, and ``every`` is not looked at.

    Adding an update rounds, so that params may be off the slow copy by an ulp or so of what they
    were before. The state is the same on all workers bit for bit; :func:`resynchronize` makes
    params so, too.

    Args:
      inner: the optimizer of each worker. It gets what ``update`` is given beyond ``sync``.
      outer_optimizer: from ``optax`` or here, for the gradient :math:`\Delta`; its schedules count
        outer steps.
      every: H, an int of at least 1: inner steps per outer step.
      axis_name: inside ``shard_map``, ``pmap`` or ``vmap``, the axis or axes of the workers, each
        with params and state of its own (a row of a stack); None: one worker.
      slow_dtype: floating or complex dtype of the slow copy, and so of the buffers of the outer
        optimizer; None: that of each parameter. With bfloat16 params float32 keeps what an outer
        step would lose to rounding; a narrower one rounds the model itself at each outer step.
        Complex parameters keep a complex copy of at least that precision, real ones a real copy.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``. Its state holds a
      copy of params and both optimizers' states.

    Raises:
      ValueError: for an every below 1, a slow_dtype that is not floating or an optimizer that is
        none; from init, if a parameter is neither floating-point nor complex; from update, if it is
        called without params.

    The point: on a valley that is steep one way, plain descent crawls along the other. Looking back
    at 10 of its steps at a time is enough to accelerate it.

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

    def init(params: optax.Params) -> OuterState:
        check_trainable("the outer step", params)
        slow = jax.tree.map(lambda p: _copy(p, slow_dtype), params)
        start = jnp.zeros([], jnp.int32)
        return OuterState(inner.init(params), slow, outer_optimizer.init(slow), start)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sync: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OuterState]:
        params, state = given_params("outer", params), as_arrays(state)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        updates = jax.tree.map(jnp.asarray, updates)  # of a Python number it may be one
        steps = jnp.asarray(optax.safe_increment(state.steps))

        def stay(updates: Any, slow: Any, outer_state: Any) -> Any:
            return updates, slow, outer_state

        def meet(updates: Any, slow: Any, outer_state: Any) -> Any:
            gradient = map_gradients(
                # From where the round began: the slow copy as params hold it.
                lambda u, p, s: wide(s.astype(dtype_of(p))) - (wide(p) + wide(u)),
                updates,
                params,
                slow,
            )
            if axis_name is not None:
                gradient = jax.lax.pmean(gradient, axis_name)
            moves, new_state = outer_optimizer.update(gradient, outer_state, slow)
            moved = map_gradients(lambda move, s: _like(mix(1.0, s, 1.0, move), s), moves, slow)
            new_slow = filled(moved, slow)
            updates = map_gradients(
                lambda u, p, s: _like(wide(s.astype(dtype_of(p))) - wide(p), u),
                updates,
                params,
                new_slow,
            )
            return updates, new_slow, jax.tree.map(_like, new_state, outer_state)

        due = sync if sync is not None else True if every == 1 else steps >= every
        arguments = updates, state.slow, state.outer
        if isinstance(due, Tracer):
            updates, slow, outer_state = jax.lax.cond(due, meet, stay, *arguments)
        else:  # outside of jit, where a cond would be compiled at every call
            updates, slow, outer_state = (meet if due else stay)(*arguments)
        steps = _like(jnp.where(due, 0, steps), state.steps)
        return updates, OuterState(inner_state, slow, outer_state, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def resynchronize(params: Any, opt_state: Any) -> Any:
    """Params without the rounding that the addition of an update leaves after an outer step.

    Call it after ``optax.apply_updates`` where params have to be the same on all workers bit for
    bit. It returns the slow copy if a round has just begun, else params as they are.

    Args:
      params: any pytree, as trained with :func:`outer`.
      opt_state: the matching state, of :func:`outer` itself or of a chain that holds it.

    Returns:
      A pytree like params, same shapes and dtypes.

    Raises:
      ValueError: if opt_state holds no state of ``outer``.

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
    for state in states:
        (steps,) = jax.tree.leaves(state.steps)
        slow = dict(jax.tree_util.tree_leaves_with_path(state.slow))
        exact = lambda path, p, steps=steps, slow=slow: (
            jnp.where(steps == 0, slow[path].astype(dtype_of(p)), p) if path in slow else p
        )
        params = jax.tree_util.tree_map_with_path(exact, params)
    return params


def _copy(p: Any, slow_dtype: Any) -> Any:
    """A buffer of its own, so that both can be donated; of an abstract leaf an abstract one."""
    dtype = dtype_of(p)
    if slow_dtype is not None:
        dtype = buffer_dtype(dtype, slow_dtype)
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding)
    return jnp.array(p, dtype, copy=True)


def _like(new: Any, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old``, and varying over the same axes of a ``shard_map``."""
    new = jnp.asarray(new, old.dtype)
    missing = tuple(varying_axes(old) - varying_axes(new))
    if not missing:
        return new
    lax: Any = jax.lax  # jax 0.7 has pvary alone
    return (
        lax.pcast(new, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(new, missing)
    )
