"""``eval_params``: the point to evaluate, from the states that know it."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from nag_jax._arithmetic import wide
from nag_jax._paths import at_paths, by_path, only_scalar
from nag_jax.kernel import AccelerateState, AtParamsState, BeforeLearningRateState
from nag_jax.precision.stochastic import NoiseState

# Wrappers that pass on the updates of the optimizer inside or, at some steps, do nothing at all.
_WRAPPERS = (
    optax.MaskedState,
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)
# States of links that pass updates on. Rounding at random changes none of them in the mean.
_TRANSPARENT = (NoiseState, optax.SnapshotState, optax.MonitorState)


def eval_params(params: Any, opt_state: Any) -> Any:
    r"""Returns the iterate to evaluate or deploy, given the parameters that are trained.

    Nesterov's method takes gradients at an extrapolated point :math:`y`, and ``params`` hold that
    point during training. Its guarantees hold for the iterate :math:`x`, which a state knows:

    .. math:: x = y + r m \quad \text{for the momentum buffer } m \text{ of } \texttt{accelerate}

    Checkpoint ``params`` and the optimizer state instead of :math:`x`: training resumes from
    ``params``. Of an optimizer without such a state, params themselves are returned.

    These states know their iterate: those of every optimizer here (for :func:`nag_jax.outer` it is
    the iterate of the last outer step, the same on all workers), optax's ``ScheduleFreeState``, and
    any ``NamedTuple`` with a method ``iterate(params)`` that returns it. They are found through
    ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``, ``apply_if_finite`` and
    ``inject_hyperparams``. The outermost one counts.

    What follows an accelerated optimizer in a chain changes by how much params move, and so where
    the iterate is. ``optax.contrib.reduce_on_plateau`` and ``stochastic_rounding`` may follow it;
    anything else is refused. Put clipping, scaling and masks before it, or wrap the whole chain in
    :func:`nag_jax.averaged`. If a link that follows leaves these updates alone, pass the state of
    the accelerated optimizer by itself (``opt_state[0]``).

    Args:
      params: the parameters as trained, any pytree; a ``flax.nnx`` state too.
      opt_state: the state of the same step: what ``init`` or ``update`` returned, or the
        ``opt_state`` of a ``flax.nnx.Optimizer``.

    Returns:
      A pytree like params, same shapes and dtypes. Parameters that no such state holds, because
      they are masked out, are returned unchanged.

    Raises:
      ValueError: if opt_state is not the state of an optimizer, belongs to other parameters, is a
        stack of states (use ``jax.vmap``), or if the iterate is not known: a link or a wrapper may
        have changed the updates, or two states claim the same parameter.

    Example:
      A wrapper of your own joins with a method on its state. This one doubles each update, and with
      it the distance from params to the iterate:

      >>> from typing import Any, NamedTuple
      >>> class DoubledState(NamedTuple):
      ...     inner: Any
      ...     def iterate(self, params):
      ...         x = nag_jax.eval_params(params, self.inner)
      ...         return jax.tree.map(lambda p, x: p + 2 * (x - p), params, x)
      >>> inner = nag_jax.nag(0.25, 0.5)
      >>> def update(updates, state, params=None):
      ...     updates, inner_state = inner.update(updates, state.inner, params)
      ...     return jax.tree.map(lambda u: 2 * u, updates), DoubledState(inner_state)
      >>> doubled = optax.GradientTransformation(lambda p: DoubledState(inner.init(p)), update)
      >>> for optimizer in (doubled, nag_jax.nag(0.5, 0.5)):
      ...     params = jnp.ones(2)
      ...     updates, state = optimizer.update(params, optimizer.init(params), params)
      ...     x = nag_jax.eval_params(optax.apply_updates(params, updates), state)
      ...     print(x)
      [0.5 0.5]
      [0.5 0.5]
    """
    is_state = lambda node: isinstance(node, tuple) and hasattr(node, "_fields")
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    if opt_state is None or (nodes and not any(map(is_state, nodes))):
        raise ValueError(
            f"opt_state must be the state of an optimizer, got {type(opt_state).__name__}; pass "
            "what init or update returned, with its classes (nnx.state and a checkpoint restored "
            "without a target lose them), or the opt_state attribute of a flax.nnx.Optimizer"
        )
    if any(map(_knows, jax.tree.leaves(params, is_leaf=_knows))):
        raise ValueError(
            "params hold the state of an optimizer; call eval_params(params, opt_state), in that "
            "order"
        )
    return evaluated(params, opt_state)


def evaluated(params: Any, opt_state: Any) -> Any:
    """:func:`eval_params` of a state that is known to be one, whatever an optimizer keeps in it."""
    before, after = by_path(params), {}
    for state in _find(opt_state):
        for path, x in by_path(_iterate(state, params)).items():
            if path in before and x is before[path]:
                continue  # not a parameter of this state
            if path in after:
                raise ValueError(
                    "opt_state holds more than one state that knows the iterate of parameter "
                    f"{jax.tree_util.keystr(path) or 'params'}; pass one of them"
                )
            after[path] = x
    return at_paths(lambda p, x: jnp.asarray(x).astype(jnp.result_type(p)), params, after)


def _knows(node: Any) -> bool:
    """Whether this state knows an iterate that is not params themselves."""
    if isinstance(node, AtParamsState) or not isinstance(node, tuple):
        return False
    has_method = callable(getattr(type(node), "iterate", None))
    return has_method or isinstance(node, optax.contrib.ScheduleFreeState)


def _iterate(state: Any, params: Any) -> Any:
    if not isinstance(state, optax.contrib.ScheduleFreeState):
        return state.iterate(params)
    b1 = only_scalar(state.b1)

    def average(y: Any, z: Any) -> jax.Array:
        share = jnp.asarray(b1, wide(y).dtype)
        return (wide(y) - (1 - share) * wide(z).astype(wide(y).dtype)) / share

    return at_paths(average, params, by_path(state.z))


def _find(node: Any) -> list[Any]:
    """The outermost states in ``node`` that know an iterate, with what follows them counted in."""
    if _knows(node):
        return [node]
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    if len(children) == 1 and children[0] is node:
        return []
    if type(node) in (tuple, list):
        return _find_in_chain(children)
    if isinstance(node, optax.PartitionState):
        return [state for child in node.inner_states.values() for state in _find(child)]
    found = [(child, states) for child in children if (states := _find(child))]
    if not found:
        return []
    if isinstance(node, dict):
        return _find_in_dict(children, found)
    if isinstance(node, tuple) and not isinstance(node, _WRAPPERS):
        name = type(node).__name__
        raise ValueError(
            f"opt_state holds an accelerated optimizer inside {name}, which may change its "
            f"updates, so the iterate is not known; give {name} a method iterate(params) that "
            "returns it, or, if it passes updates on as they are, pass the state inside"
        )
    return [state for _, states in found for state in states]


def _find_in_chain(links: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for link in links:
        found = [_followed(state, link) for state in found] + _find(link)
    return found


def _find_in_dict(links: Iterable[Any], found: list[tuple[Any, list[Any]]]) -> list[Any]:
    """Of ``optax.named_chain``, whose order is lost: JAX sorts the keys of a dict."""
    (link, states), *others = found
    if others or not all(other is link or _is_transparent(other) for other in links):
        raise ValueError(
            "opt_state holds an accelerated optimizer in a dict, as optax.named_chain makes it, "
            "and JAX does not keep the order of a dict, so it is not known what follows; if "
            "nothing does, pass the entry of the accelerated optimizer, or use optax.chain"
        )
    return states


def _followed(state: Any, link: Any) -> Any:
    """``state`` after the update has gone through a link of this state, too."""
    if isinstance(state, BeforeLearningRateState):
        return AccelerateState(*state)  # this link is the learning rate
    if _is_transparent(link):
        return state
    if isinstance(link, optax.contrib.ReduceLROnPlateauState) and isinstance(
        state, AccelerateState
    ):
        # The update that it has scaled leads from y to y + scale*(u + m'), so x is y + scale*u.
        readout, scale = only_scalar(state.readout), only_scalar(link.scale)
        return state._replace(readout=readout * jnp.asarray(scale, readout.dtype))
    raise ValueError(
        f"opt_state has a link after the accelerated optimizer, of state {type(link).__name__}, "
        "that may change its updates, so the iterate is not known; put that link before it in the "
        "chain (for groups of parameters use optax.partition) or, if it leaves these updates "
        "alone, pass the state of the accelerated optimizer by itself"
    )


def _is_transparent(link: Any) -> bool:
    if isinstance(link, optax.MaskedState):
        return _is_transparent(link.inner_state)
    if type(link) in (tuple, list):
        return all(map(_is_transparent, link))
    return isinstance(link, _TRANSPARENT)
