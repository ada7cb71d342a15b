"""The kernel: one params-sized buffer and, each step, the scalars of a rule."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax import _restarting, _storage
from nag_jax._arithmetic import as_arrays, cast_like, cast_tree, map_gradients, mix
from nag_jax._rule import Rule, scalar

_STALLS = 0.98  # from this momentum on, a bfloat16 buffer loses over a tenth of its limit
_STEPS_AHEAD = 20_000  # how far a scheduled momentum is looked at for that


class AccelerateState(NamedTuple):
    """State of :func:`accelerate`."""

    m: optax.Updates  # like params; dtype of params, or accumulator_dtype (bfloat16, int8)
    carry: Any  # the rule's scalars
    readout: jax.Array  # shape=(), default float dtype
    restart: Any = ()  # RestartState if there is a restart condition
    storage: Any = ()  # NoiseState or BlockState if the buffer is stored by stochastic rounding


class OuterState(NamedTuple):
    """State of :func:`nag_jax.outer`; here, since :func:`eval_params` has to know it."""

    inner: Any  # of the inner optimizer; kept over outer steps
    slow: optax.Params  # where the round began, like params; their dtype, or slow_dtype
    outer: Any  # of the outer optimizer
    steps: jax.Array  # inner steps since the last outer step, shape=(), int32


def accelerate(
    rule: Rule,
    restart: _restarting.Condition | None = None,
    *,
    axis_name: Any = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nesterov's momentum, and its relatives, on whatever step the chain proposes.

    With ``u`` the update that arrives here and the rule's scalars of this step,

    .. math::
        m' = \beta m + \kappa u, \qquad
        \mathrm{update} = d\, u + l\, m', \qquad
        x_{\mathrm{eval}} = \mathrm{params} + r\, m'

    Put it *last*, after the learning rate, for rules in units of the parameters
    (``rules.nesterov``, ...): that is exact under any schedule. ``rules.trace`` alone stands
    before the learning rate. All arithmetic is float32 at least, float64 where leaves are.

    Args:
      rule: the method, from ``nag_jax.rules``.
      restart: a condition from ``nag_jax.restart`` that empties the buffer and starts the rule
        anew, so that the next params are params + u; None: never. It needs a rule with d = l = 1.
        How often it fired is in the state: ``optax.tree.get(state, "restarts")``.
      axis_name: inside ``shard_map`` or ``pmap``, the axis or axes over which leaves are sharded or
        devices have a ``value`` of their own, for a restart that all devices agree on; None where
        every device holds all of each leaf and the same value.
      accumulator_dtype: floating dtype of the buffer, or a storage such as
        ``nag_jax.stochastic_bfloat16()`` or ``nag_jax.int8_blocks()``; default: the dtype of
        each parameter. Complex parameters keep a complex buffer of at least that precision.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs no ``params``, returns the
      dtype of the incoming updates and never changes a shape or dtype of its state.

    Raises:
      ValueError: if accumulator_dtype is no floating dtype or storage, or restart no function; from
        ``init``, if a parameter is neither floating nor complex, or for a restart of a rule
        whose d or l is not 1.

    The point: any optimizer can be accelerated, and the iterate to evaluate is known.

    >>> tx = optax.chain(optax.adam(0.1), nag_jax.accelerate(rules.nesterov(0.5)))
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([1.0, -1.0]), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> for point in (params, nag_jax.eval_params(params, state)):
    ...     print([f"{value:.2f}" for value in point])
    ['0.85', '-1.85']
    ['0.90', '-1.90']
    """
    storage = _storage.choose(accumulator_dtype)
    _restarting.check(restart)

    def init(params: optax.Params) -> AccelerateState:
        m, memory = storage.init(params)
        if not storage.unbiased:
            _warn_where_momentum_stalls(rule, m)
        carry = rule.init()
        if restart is not None:
            _restarting.check_rule(rule.step(carry)[1])
        start = () if restart is None else _restarting.start()
        readout = jnp.zeros([], float)
        return AccelerateState(m=m, carry=carry, readout=readout, restart=start, storage=memory)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccelerateState]:
        del params
        state = as_arrays(state)
        carry, c = rule.step(state.carry)
        carry = cast_tree(carry, state.carry)
        old, seen = _storage.read(state.m, state.storage), state.restart
        if restart is not None:
            fire, seen = _restarting.decide(
                restart, seen, updates, old, axis_name, extra_args.get("value")
            )
            # No branch and no pass of its own over the buffer: the scalars become those of m' = 0.
            c = c._replace(beta=jnp.where(fire, 0, c.beta), kappa=jnp.where(fire, 0, c.kappa))
            fresh = rule.init() if rule.restart is None else rule.restart(carry)
            start = cast_tree(fresh, carry)
            carry = jax.tree.map(lambda a, b: jnp.where(fire, a, b), start, carry)
        new = map_gradients(lambda u, m: mix(c.beta, m, c.kappa, u), updates, old)
        m, memory = storage.store(new, state.m, state.storage)
        # From the stored buffer, so that x_eval = params + readout*m holds for rounded ones too.
        updates = map_gradients(
            lambda u, m: cast_like(mix(c.direct, u, c.lookahead, m), u),
            updates,
            _storage.read(m, memory),
        )
        readout = jnp.asarray(scalar(c.readout), state.readout.dtype)
        return updates, AccelerateState(
            m=m, carry=carry, readout=readout, restart=seen, storage=memory
        )

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(params: Any, opt_state: Any) -> Any:
    """The iterate to evaluate and to save, given the parameters where gradients are taken.

    Nesterov's method takes gradients at an extrapolated point ``y``, and that is what ``params``
    hold during training; its guarantees are about the iterate ``x = y + readout*m``. The
    difference vanishes with the step size. Do not train on from ``x``: keep ``params`` for that.

    Under :func:`nag_jax.outer` it is the iterate of the outer optimizer as of the last outer step,
    the same on all workers: the slow copy, or the x that belongs to it if that optimizer holds an
    ``accelerate``.

    Args:
      params: any pytree, as trained; a ``flax.nnx`` state too.
      opt_state: the matching state of any chain that holds :func:`accelerate` or
        :func:`nag_jax.outer`: through ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``,
        ``inject_hyperparams``, or the ``opt_state`` of a ``flax.nnx.Optimizer``. What was masked
        out comes back as it is.

    Returns:
      A pytree like params, same shapes and dtypes.

    Raises:
      ValueError: if opt_state holds no state of ``accelerate``, more than one for the same
        parameter, or one that belongs to other parameters.
    """
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            "opt_state holds no state of nag_jax.accelerate, got "
            f"{jax.tree.structure(opt_state)}; pass what optimizer.init(params) returned, or "
            "the opt_state attribute of a flax.nnx.Optimizer"
        )
    # Matched by path: flax's variables are other nodes in the optimizer than in the model, and
    # where a mask left a parameter out, a path is all that is missing.
    offsets: dict[Any, tuple[Any, jax.Array]] = {}
    for state in states:
        outer = isinstance(state, OuterState)
        (scalar,) = jax.tree.leaves(state.steps if outer else state.readout)
        if jnp.ndim(scalar):
            raise ValueError(
                f"opt_state is a stack of {jnp.shape(scalar)} states, as jax.vmap or replication "
                "makes them; use jax.vmap(nag_jax.eval_params)(params, opt_state)"
            )
        readout, tree = (
            (None, _outer_iterate(state))
            if outer
            else (scalar, _storage.read(state.m, state.storage))
        )
        for path, m in jax.tree_util.tree_leaves_with_path(tree):
            if path in offsets:
                raise ValueError(
                    "opt_state holds more than one state of nag_jax.accelerate for parameter "
                    f"{jax.tree_util.keystr(path)}; keep one accelerate for each parameter"
                )
            offsets[path] = readout, m

    def shift(path: Any, p: Any) -> Any:
        if path not in offsets:
            return p
        readout, m = offsets.pop(path)
        if jnp.shape(m) != jnp.shape(p):
            raise ValueError(
                f"opt_state does not belong to params: {jax.tree_util.keystr(path)} has shape "
                f"{jnp.shape(p)} in params and {jnp.shape(m)} in the buffer"
            )
        x = m if readout is None else mix(1.0, p, readout, m)
        return x.astype(jnp.result_type(p))

    shifted = jax.tree_util.tree_map_with_path(shift, params)
    if offsets:
        missing = ", ".join(jax.tree_util.keystr(path) for path in offsets)
        raise ValueError(
            f"opt_state does not belong to params: they have no {missing}; pass the tree that "
            "init and update were given (for flax: nnx.state(model, nnx.Param))"
        )
    return shifted


def find_states(opt_state: Any) -> list[Any]:
    """Every state in ``opt_state`` that knows an iterate to evaluate."""
    is_state = lambda node: isinstance(node, AccelerateState | OuterState)
    return [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]


def _outer_iterate(state: OuterState) -> Any:
    return eval_params(state.slow, state.outer) if find_states(state.outer) else state.slow


def _warn_where_momentum_stalls(rule: Rule, m: Any) -> None:
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(m) if leaf.dtype.itemsize < 4}
    largest = _largest_momentum(rule) if narrow else 0.0
    if isinstance(largest, Tracer) or float(largest) < _STALLS:
        return
    warnings.warn(
        f"momentum {float(largest):.3g} in a {' and '.join(sorted(narrow))} buffer stalls below "
        "its limit: nearest rounding drops small steps; pass accumulator_dtype=jnp.float32, or "
        "nag_jax.stochastic_bfloat16(), which needs no more memory",
        stacklevel=3,
    )


def _largest_momentum(rule: Rule) -> Any:
    """The first momentum that stalls, or that of the last step looked at."""
    with jax.ensure_compile_time_eval():
        carry, c = rule.step(rule.init())
        if isinstance(c.beta, int | float):
            return c.beta

        def advance(loop: Any) -> Any:
            k, carry, _ = loop
            carry, c = rule.step(carry)
            return k + 1, carry, jnp.asarray(c.beta, float)

        unsettled = lambda loop: (loop[0] < _STEPS_AHEAD) & (loop[2] < _STALLS)
        start = 0, carry, jnp.asarray(c.beta, float)
        return jax.lax.while_loop(unsettled, advance, start)[2]
