"""``resynchronize``: parameters without the rounding error of an outer step."""

import jax
import jax.numpy as jnp

from nag_jax._arithmetic import dtype_of
from nag_jax._paths import by_path
from nag_jax._types import KeyPath, OptState, PyTree
from nag_jax.methods._fragments import numbered
from nag_jax.methods._host import on_device
from nag_jax.methods._outer_state import OuterState


def resynchronize(params: PyTree, opt_state: OptState) -> PyTree:
    """Removes the rounding error that params have after an outer step of :func:`outer`.

    Call it after ``optax.apply_updates`` if params must be bit for bit the same on all workers.

    Args:
      params: the parameters as trained with :func:`outer`, any pytree.
      opt_state: the state of the same step, of :func:`outer` or of a chain that contains it.

    Returns:
      A pytree like params, with the same shapes and dtypes. Directly after an outer step it is the
      slow copy, with fragments where these took it; otherwise, and with ``mixing``, it is params
      unchanged.

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
