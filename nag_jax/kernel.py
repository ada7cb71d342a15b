"""``accelerate``: one buffer of the size of params, and the scalars of a rule at each step."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nag_jax import restart as conditions
from nag_jax._arithmetic import as_arrays, cast_like, cast_tree, map_gradients, mix
from nag_jax._paths import at_paths, by_path, only_scalar
from nag_jax._types import (
    AxisName,
    BufferDType,
    Params,
    PyTree,
    RestartLike,
    Scalar,
    Updates,
    transformation,
)
from nag_jax.precision import storage as storages
from nag_jax.restart import decision
from nag_jax.rules.rule import Coefficients, Rule, scalar

_STALLS = 0.98  # with this momentum, a bfloat16 buffer stops more than a tenth below its limit
_STEPS_AHEAD = 20_000  # steps of a scheduled momentum that are checked for that


class AccelerateState(NamedTuple):
    """State of :func:`accelerate`."""

    m: Updates  # like params; dtype of params, or accumulator_dtype (bfloat16, int8)
    carry: PyTree  # the rule's scalars
    readout: jax.Array  # shape=(), default float dtype
    restart: PyTree = ()  # RestartState if there is a restart condition
    storage: PyTree = ()  # NoiseState or BlockState if the buffer is stored by stochastic rounding

    def iterate(self, params: Params) -> Params:
        """Returns ``params + readout*m``, for :func:`eval_params`."""
        buffer = storages.read(self.m, self.storage)
        return shifted(params, buffer, only_scalar(self.readout))


class BeforeLearningRateState(AccelerateState):
    """State for a rule such as ``rules.trace``, after which the learning rate follows."""


class AtParamsState(AccelerateState):
    """State for a rule such as ``rules.heavy_ball``: params are the iterate to evaluate."""


def accelerate(
    rule: Rule,
    restart: RestartLike = None,
    *,
    axis_name: AxisName | None = None,
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Nesterov momentum, or that of a related method, to the updates of the links before it.

    With :math:`u` the incoming update, :math:`m` the buffer, and the rule's scalars of this step,

    .. math::
        m' = \beta m + \kappa u, \qquad
        \mathrm{update} = d\, u + l\, m', \qquad
        x_{\mathrm{eval}} = \mathrm{params} + r\, m'

    Place it last in the chain, after the learning rate: most rules work in units of the parameters
    and are then exact under any schedule. ``rules.trace`` is the exception and goes before the
    learning rate. A later link that changes the update also moves the iterate, so
    :func:`eval_params` raises an error for most of them. Arithmetic uses at least float32, and
    float64 for float64 leaves.

    Args:
      rule: the method, from ``nag_jax.rules``.
      restart: "gradient", "value" (update then needs ``value=loss``), "speed", or a condition from
        ``nag_jax.restart``; None: never. In the step after the condition was true, the last
        extrapolation is undone and the rule starts again. A restart needs a rule with d = l = 1.
        The state has the number of restarts: ``optax.tree.get(state, "restarts")``.
      axis_name: the axis or axes of ``shard_map`` or ``pmap`` over which leaves are sharded or
        devices have different values of the loss, so that all devices agree on a restart; None if
        every device holds all of each leaf and the same value.
      accumulator_dtype: floating or complex dtype of the buffer, or a storage such as
        ``nag_jax.stochastic_bfloat16()`` or ``nag_jax.int8_blocks()``; None: the dtype of each
        parameter. Complex parameters keep a complex buffer of at least that precision, real ones
        a real buffer.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update does not need ``params``. It returns
      the dtypes of the incoming updates, and keeps the shapes and dtypes of its state.

    Raises:
      ValueError: if rule is not a Rule, if accumulator_dtype is neither a floating or complex dtype
        nor a storage, or for an unknown restart; from ``init``, if a parameter is neither
        floating-point nor complex, or for a restart of a rule whose d or l is not 1.

    Example:
      Adam with Nesterov momentum. The parameters and the iterate to evaluate after one step:

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
    _check_rule(rule)
    storage = storages.choose(accumulator_dtype)
    condition = conditions.by_name(restart)
    kind = BeforeLearningRateState if rule.before_learning_rate else AccelerateState
    kind = AtParamsState if rule.at_params else kind

    def init(params: Params) -> AccelerateState:
        m, memory = storage.init(params)
        if not storage.unbiased:
            _warn_where_momentum_stalls(rule, m)
        carry = rule.init()
        if condition is not None:
            decision.check_rule(rule.step(carry)[1])
        start = () if condition is None else decision.begin()
        readout = jnp.zeros([], float)
        return kind(m=m, carry=carry, readout=readout, restart=start, storage=memory)

    def update(
        updates: Updates,
        state: AccelerateState,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[Updates, AccelerateState]:
        del params
        state = as_arrays(state)
        carry, c = rule.step(state.carry)
        carry = cast_tree(carry, state.carry)
        old, restart_state = storages.read(state.m, state.storage), state.restart
        if condition is None:
            c = _in_one_array(c)
        else:
            c = decision.restarted(restart_state, c)
            fresh = rule.init() if rule.restart is None else rule.restart(carry)
            due = restart_state.phase == decision.DUE
            restart = lambda fresh, carry: jnp.where(due, fresh.astype(carry.dtype), carry)
            carry = jax.tree.map(restart, as_arrays(fresh), carry)
            restart_state = decision.advance(
                condition, restart_state, updates, old, axis_name, extra_args.get("value")
            )
        new = map_gradients(lambda u, m: mix(c.beta, m, c.kappa, u), updates, old)
        m, memory = storage.store(new, state.m, state.storage)
        # From the stored buffer, so that x_eval = params + readout*m holds for rounded ones too.
        updates = map_gradients(
            lambda u, m: cast_like(mix(c.direct, u, c.lookahead, m), u),
            updates,
            storages.read(m, memory),
        )
        readout = jnp.asarray(scalar(c.readout), state.readout.dtype)
        return updates, state._replace(
            m=m,
            carry=carry,
            readout=readout,
            restart=restart_state,
            storage=memory,
        )

    return transformation(init, update)


def _check_rule(rule: object) -> None:
    if isinstance(rule, Rule):
        return
    name = getattr(rule, "__name__", None)
    called = f"call it, as in {name}()" if name else "pass one, such as nag_jax.rules.nesterov(0.9)"
    raise ValueError(f"rule must be a nag_jax.rules.Rule, got {name or repr(rule)}; {called}")


def shifted(params: Params, m: PyTree, by: Scalar) -> Params:
    """``params + by*m``, in at least float32, where ``m`` has a leaf; other leaves unchanged."""
    shift = lambda p, m: mix(1.0, p, by, m).astype(jnp.result_type(p))
    return at_paths(shift, params, by_path(m))


def _in_one_array(c: Coefficients) -> Coefficients:
    """The same scalars, with those of the buffer as elements of one array that XLA keeps whole.

    XLA merges the kernels of small leaves on a GPU if they read an array that they share, which
    saves launches: 27 instead of 161 for a ResNet-50. It does not merge them for scalars or
    constants.
    """
    both = jnp.stack([jnp.asarray(scalar(x), float) for x in (c.beta, c.kappa)])
    shared = jax.lax.optimization_barrier(both)
    return c._replace(beta=shared[0], kappa=shared[1])


def _warn_where_momentum_stalls(rule: Rule, m: PyTree) -> None:
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(m) if leaf.dtype.itemsize < 4}
    momentum = _first_stalling_momentum(rule) if narrow else 0.0
    if isinstance(momentum, Tracer) or float(momentum) < _STALLS:
        return
    warnings.warn(
        f"momentum {float(momentum):.3g} in a {' and '.join(sorted(narrow))} buffer stalls below "
        "its limit: nearest rounding drops small steps; pass accumulator_dtype=jnp.float32, or "
        "nag_jax.stochastic_bfloat16(), which needs no more memory",
        stacklevel=3,
    )


def _first_stalling_momentum(rule: Rule) -> Scalar:
    """The first momentum of the rule that stalls; if none does, that of the last step checked."""
    with jax.ensure_compile_time_eval():
        carry, c = rule.step(rule.init())
        if isinstance(c.beta, int | float):
            return c.beta

        def advance(loop: PyTree) -> PyTree:
            k, carry, _ = loop
            carry, c = rule.step(carry)
            return k + 1, carry, jnp.asarray(c.beta, float)

        unsettled = lambda loop: (loop[0] < _STEPS_AHEAD) & (loop[2] < _STALLS)
        start = 0, carry, jnp.asarray(c.beta, float)
        return jax.lax.while_loop(unsettled, advance, start)[2]
