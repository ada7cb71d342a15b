"""The argument of a restart condition, and how ``accelerate`` acts on its decision a step later.

The sums for the decision are computed in the same pass over the arrays as the new buffer and the
update, so that a restart needs no additional pass. They are known at the end of that pass, so the
decision is for the next step. That step undoes the last extrapolation,

    m' = -m,  update = u + m',  x_eval = params

and the rule starts again from its first step, with a buffer that is treated as empty.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import map_gradients, mix
from nag_jax._checks import given_scalar
from nag_jax._reductions import inner_product, mean_over_devices
from nag_jax._types import AxisName, PyTree, Updates
from nag_jax._types import Condition as Condition
from nag_jax.rules.rule import Coefficients

# Phases: no restart, the next step restarts, the last step restarted and the buffer is empty.
RUNNING, DUE, EMPTY = 0, 1, 2


class Seen(NamedTuple):
    """The argument of a condition."""

    steps: jax.Array  # since the last restart, int32 []
    remembered: jax.Array  # what the condition returned at the step before, float []; 0 at first
    u: Updates  # the incoming update of accelerate, like params
    v: Updates  # x_{k+1} - x_k = m + u, where x is the iterate, like params
    dot: Callable[[Updates, Updates], jax.Array]  # real inner product over all leaves and devices
    value: jax.Array | None  # the loss at params if update has value=, float []; mean over devices


class RestartState(NamedTuple):
    """The part of the state of ``accelerate`` that belongs to a restart condition."""

    restarts: jax.Array  # number of restarts so far, shape=(), int32
    steps: jax.Array  # since the last restart, shape=(), int32
    remembered: jax.Array  # shape=(), default float dtype
    phase: jax.Array  # RUNNING, DUE or EMPTY, shape=(), int32


def begin() -> RestartState:
    """The state before the first step."""
    zero = lambda dtype: jnp.zeros([], dtype)  # separate arrays, so that all can be donated
    return RestartState(zero(jnp.int32), zero(jnp.int32), zero(float), zero(jnp.int32))


def restarted(state: RestartState, c: Coefficients) -> Coefficients:
    """The scalars of this step: ``c``, unless this step or the last one restarts."""
    due, empty = state.phase == DUE, state.phase == EMPTY
    return c._replace(
        beta=jnp.where(due, -1.0, jnp.where(empty, 0.0, c.beta)),
        kappa=jnp.where(due, 0.0, c.kappa),
        readout=jnp.where(due, 0.0, c.readout),
    )


def advance(
    condition: Condition,
    state: RestartState,
    u: Updates,
    m: Updates,
    axis_name: AxisName | None,
    loss: PyTree,
) -> RestartState:
    """The state after a step whose update was ``u`` and whose old buffer was ``m``."""
    due, empty = state.phase == DUE, state.phase == EMPTY
    kept = jnp.where(empty, 0.0, 1.0)
    v = map_gradients(lambda u, m: mix(kept, m, 1.0, u), u, m)
    fire, remembered = ask(condition, state, u, v, axis_name, loss)
    # If this step restarts, m is from before the restart, and nothing is decided from it.
    steps = jnp.where(fire, 0, optax.safe_increment(state.steps))
    return RestartState(
        restarts=jnp.where(due, optax.safe_increment(state.restarts), state.restarts),
        steps=jnp.where(due, state.steps, steps),
        remembered=jnp.where(due, state.remembered, remembered),
        phase=jnp.where(due, EMPTY, jnp.where(fire, DUE, RUNNING)).astype(state.phase.dtype),
    )


def ask(
    condition: Condition,
    state: RestartState,
    u: Updates,
    v: Updates,
    axis_name: AxisName | None,
    loss: PyTree,
) -> tuple[jax.Array, jax.Array]:
    """What the condition returns, checked: whether to restart, and what to remember."""
    real = state.remembered.dtype
    dot = lambda a, b: inner_product(a, b, axis_name).astype(real)
    value = None
    if loss is not None:
        # Otherwise each device would decide by its own rows, and the copies would differ.
        value = mean_over_devices(given_scalar("value", loss), axis_name).astype(real)
    result = condition(Seen(state.steps, state.remembered, u, v, dot, value))
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise ValueError(
            f"a restart condition must return a pair (fire, remembered), got {result!r}; return "
            "seen.remembered where there is nothing to remember"
        )
    fire = given_scalar("what a restart condition returns first", result[0]).astype(bool)
    remembered = given_scalar("what a restart condition returns second", result[1])
    return fire, remembered.astype(real)


def check_rule(c: Coefficients) -> None:
    """Raises ValueError for a rule that would not take plain steps with an empty buffer."""
    for scalar in (c.direct, c.lookahead):
        if not isinstance(scalar, int | float) or scalar != 1:
            raise ValueError(
                "restart needs a rule with update = u + m', got direct="
                f"{c.direct}, lookahead={c.lookahead}; use rules.fista(), nesterov(), ogm(), ..."
            )
