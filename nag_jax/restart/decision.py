"""What a restart condition sees, and how ``accelerate`` acts on its decision one step later.

The sums for the decision are made in the pass over the arrays that also makes the new buffer and
the update, so a restart costs nothing on a chip that is limited by its memory. They are known when
that pass is over, so the decision is for the next step. That step takes the last extrapolation
back,

    m' = -m,  update = u + m',  x_eval = params

and the rule starts again from its first step, with a buffer that counts as empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import map_gradients, mix
from nag_jax._checks import given_scalar
from nag_jax._reductions import inner_product, mean_over_devices
from nag_jax.rules.rule import Coefficients

RUNNING, DUE, EMPTY = 0, 1, 2  # phases


class Seen(NamedTuple):
    """What a condition may look at: x is the iterate, u the step that the chain proposes."""

    steps: jax.Array  # since the last restart, int32 []
    remembered: jax.Array  # what the condition returned last, float []; 0 at first
    u: Any  # like params
    v: Any  # x_{k+1} - x_k = m + u, like params
    dot: Callable[[Any, Any], jax.Array]  # real inner product over all leaves and devices
    value: Any  # of the loss at params, if update was called with value=; mean over devices


class RestartState(NamedTuple):
    """What a restart condition adds to the state of ``accelerate``."""

    restarts: jax.Array  # how many there were, shape=(), int32
    steps: jax.Array  # since the last restart, shape=(), int32
    remembered: jax.Array  # shape=(), default float dtype
    phase: jax.Array  # 0: running; 1: the next step restarts; 2: it did, shape=(), int32


Condition = Callable[[Seen], tuple[Any, Any]]


def begin() -> RestartState:
    """The state before the first step."""
    zero = lambda dtype: jnp.zeros([], dtype)  # one buffer each, so that all can be donated
    return RestartState(zero(jnp.int32), zero(jnp.int32), zero(float), zero(jnp.int32))


def restarted(state: RestartState, c: Coefficients) -> Coefficients:
    """The scalars of this step: ``c``, unless a restart is due or was made at the last step."""
    due, empty = state.phase == DUE, state.phase == EMPTY
    return c._replace(
        beta=jnp.where(due, -1.0, jnp.where(empty, 0.0, c.beta)),
        kappa=jnp.where(due, 0.0, c.kappa),
        readout=jnp.where(due, 0.0, c.readout),
    )


def advance(
    condition: Condition, state: RestartState, u: Any, m: Any, axis_name: Any, loss: Any
) -> RestartState:
    """The state after a step whose update was ``u`` and whose old buffer was ``m``."""
    due, empty = state.phase == DUE, state.phase == EMPTY
    kept = jnp.where(empty, 0.0, 1.0)
    v = map_gradients(lambda u, m: mix(kept, m, 1.0, u), u, m)
    fire, remembered = ask(condition, state, u, v, axis_name, loss)
    # Where a restart was due m is that of the run before it: nothing is decided from that.
    steps = jnp.where(fire, 0, optax.safe_increment(state.steps))
    return RestartState(
        restarts=jnp.where(due, optax.safe_increment(state.restarts), state.restarts),
        steps=jnp.where(due, state.steps, steps),
        remembered=jnp.where(due, state.remembered, remembered),
        phase=jnp.where(due, EMPTY, jnp.where(fire, DUE, RUNNING)).astype(state.phase.dtype),
    )


def ask(
    condition: Condition, state: RestartState, u: Any, v: Any, axis_name: Any, loss: Any
) -> tuple[jax.Array, jax.Array]:
    """What the condition returns, checked: whether to restart, and what to remember."""
    real = state.remembered.dtype
    dot = lambda a, b: inner_product(a, b, axis_name).astype(real)
    if loss is not None:
        # Otherwise each device would decide by the loss of its own rows, and the copies differ.
        loss = mean_over_devices(given_scalar("value", loss), axis_name).astype(real)
    result = condition(Seen(state.steps, state.remembered, u, v, dot, loss))
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise ValueError(
            f"a restart condition must return a pair (fire, remembered), got {result!r}; return "
            "seen.remembered where there is nothing to remember"
        )
    fire = given_scalar("what a restart condition returns first", result[0]).astype(bool)
    remembered = given_scalar("what a restart condition returns second", result[1])
    return fire, remembered.astype(real)


def check_rule(c: Coefficients) -> None:
    """Raises ValueError for a rule that a restart would not bring back to the gradient step."""
    for scalar in (c.direct, c.lookahead):
        if not isinstance(scalar, int | float) or scalar != 1:
            raise ValueError(
                "restart needs a rule with update = u + m', got direct="
                f"{c.direct}, lookahead={c.lookahead}; use rules.fista(), nesterov(), ogm(), ..."
            )
