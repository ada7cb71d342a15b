"""``eval_params``: the iterate to evaluate, computed from params and the optimizer's state."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from nag_jax._arithmetic import wide
from nag_jax._paths import at_paths, by_path, only_scalar
from nag_jax._types import KeyPath, OptState, PyTree
from nag_jax.kernel import AccelerateState, AtParamsState, BeforeLearningRateState
from nag_jax.precision.rounding import NoiseState


class KnowsIterate(Protocol):
    """A state with a method ``iterate``, a ``NamedTuple``."""

    def iterate(self, params: PyTree, /) -> PyTree: ...


Knowing: TypeAlias = KnowsIterate | optax.contrib.ScheduleFreeState

# Wrappers that return the updates of the optimizer inside unchanged or, at some steps, zeros.
_WRAPPERS = (
    optax.MaskedState,
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)
# Links that return updates unchanged. Stochastic rounding changes them, but not in the mean.
_TRANSPARENT = (NoiseState, optax.SnapshotState, optax.MonitorState)


def eval_params(params: PyTree, opt_state: OptState) -> PyTree:
    r"""Returns the iterate to evaluate or deploy, given the parameters that are trained.

    Nesterov's method takes gradients at an extrapolated point :math:`y`, and ``params`` hold that
    point during training. Its guarantees hold for the iterate :math:`x`. For ``accelerate`` with
    momentum buffer :math:`m` and readout :math:`r`,

    .. math:: x = y + r m

    Checkpoint ``params`` and the optimizer state instead of :math:`x`: training resumes from
    ``params``. For an optimizer without such an iterate, params themselves are returned.

    The iterate is known to the state of every optimizer here (for :func:`nag_jax.outer` it is the
    iterate of the last outer step, the same on all workers), to optax's ``ScheduleFreeState``, and
    to any ``NamedTuple`` with a method ``iterate(params)`` that returns it. Such states are found
    inside ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``, ``apply_if_finite`` and
    ``inject_hyperparams``. If one contains another, the outer one is used.

    A link after an accelerated optimizer in a chain changes how far params move, and therefore
    where the iterate is. ``optax.contrib.reduce_on_plateau`` and ``stochastic_rounding`` may follow
    it; any other link is an error. Put clipping, scaling and masks before it, or wrap the whole
    chain in :func:`nag_jax.averaged`. If a later link does not change these updates, pass only the
    state of the accelerated optimizer (``opt_state[0]``).

    Args:
      params: the parameters as trained, any pytree, including a ``flax.nnx`` state.
      opt_state: the state of the same step: what ``init`` or ``update`` returned, or the
        ``opt_state`` of a ``flax.nnx.Optimizer``.

    Returns:
      A pytree like params, with the same shapes and dtypes. Parameters without an iterate, such
      as those that are masked out, are returned unchanged.

    Raises:
      ValueError: if opt_state is not the state of an optimizer, belongs to other parameters or is
        a stack of states (use ``jax.vmap``); if a link or a wrapper may have changed the updates,
        or two states hold an iterate of the same parameter, so that the iterate is not known.

    Example:
      Your own wrapper can take part through a method on its state. This one doubles each update,
      and with it the distance from params to the iterate:

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
    # Every transformation of optax has a NamedTuple as its state; other trees are mistakes.
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


def evaluated(params: PyTree, opt_state: OptState) -> PyTree:
    """:func:`eval_params` without the checks of its arguments, for states of any optimizer."""
    before = by_path(params)
    after: dict[KeyPath, jax.Array] = {}
    for state in _find(opt_state):
        for path, x in by_path(_iterate(state, params)).items():
            # at_paths returns the very leaf of params where a state does not hold the parameter.
            if path in before and x is before[path]:
                continue
            if path in after:
                raise ValueError(
                    "opt_state holds more than one state that knows the iterate of parameter "
                    f"{jax.tree_util.keystr(path) or 'params'}; pass one of them"
                )
            after[path] = x
    return at_paths(lambda p, x: jnp.asarray(x).astype(jnp.result_type(p)), params, after)


def _knows(node: PyTree) -> TypeGuard[Knowing]:
    """Whether this is a state that knows an iterate other than params."""
    if isinstance(node, AtParamsState) or not isinstance(node, tuple):
        return False
    has_method = callable(getattr(type(node), "iterate", None))
    return has_method or isinstance(node, optax.contrib.ScheduleFreeState)


def _iterate(state: Knowing, params: PyTree) -> PyTree:
    if not isinstance(state, optax.contrib.ScheduleFreeState):
        return state.iterate(params)
    b1 = only_scalar(state.b1)

    def average(y: jax.Array, z: jax.Array) -> jax.Array:
        # Its params are y = b1*x + (1 - b1)*z, solved for x.
        share = jnp.asarray(b1, wide(y).dtype)
        return (wide(y) - (1 - share) * wide(z).astype(wide(y).dtype)) / share

    return at_paths(average, params, by_path(state.z))


def _find(node: PyTree) -> list[Knowing]:
    """The outermost states in ``node`` that know an iterate, corrected for the links after them."""
    if _knows(node):
        return [node]
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    if len(children) == 1 and children[0] is node:  # a leaf
        return []
    # The state of a chain is a plain tuple; a checkpoint may restore it as a list.
    if type(node) in (tuple, list):
        return _find_in_chain(children)
    # Groups of parameters side by side, not one after another: nothing follows.
    if isinstance(node, optax.PartitionState):
        return [state for child in node.inner_states.values() for state in _find(child)]
    found = [(child, states) for child in children if (states := _find(child))]
    if not found:
        return []
    if isinstance(node, dict):
        return _find_in_dict(children, found)
    # Other nodes, such as a dataclass, are assumed to only hold the state.
    if isinstance(node, tuple) and not isinstance(node, _WRAPPERS):
        name = type(node).__name__
        raise ValueError(
            f"opt_state holds an accelerated optimizer inside {name}, which may change its "
            f"updates, so the iterate is not known; give {name} a method iterate(params) that "
            "returns it, or, if it does not change updates, pass the state inside"
        )
    return [state for _, states in found for state in states]


def _find_in_chain(links: Iterable[OptState]) -> list[Knowing]:
    found: list[Knowing] = []
    for link in links:
        found = [_followed(state, link) for state in found] + _find(link)
    return found


def _find_in_dict(
    links: Iterable[OptState], found: Sequence[tuple[OptState, list[Knowing]]]
) -> list[Knowing]:
    """The same for ``optax.named_chain``. Its order is lost, since JAX sorts the keys of a dict."""
    (link, states), *others = found
    if others or not all(other is link or _is_transparent(other) for other in links):
        raise ValueError(
            "opt_state holds an accelerated optimizer in a dict, as optax.named_chain makes it, "
            "and JAX does not keep the order of a dict, so the links after it are not known; if "
            "there are none, pass the entry of the accelerated optimizer, or use optax.chain"
        )
    return states


def _followed(state: Knowing, link: OptState) -> Knowing:
    """``state`` corrected for a later link in the chain, given the state of that link."""
    if isinstance(state, BeforeLearningRateState):
        # This link is the learning rate, which readout includes. Nothing else may follow.
        return AccelerateState(*state)
    if _is_transparent(link):
        return state
    if isinstance(link, optax.contrib.ReduceLROnPlateauState) and isinstance(
        state, AccelerateState
    ):
        # It scales the update, so params become y + scale*(u + m'), and x is y + scale*u.
        readout, scale = only_scalar(state.readout), only_scalar(link.scale)
        return state._replace(readout=readout * jnp.asarray(scale, readout.dtype))
    raise ValueError(
        f"opt_state has a link after the accelerated optimizer, of state {type(link).__name__}, "
        "that may change its updates, so the iterate is not known; put that link before it in the "
        "chain (for groups of parameters use optax.partition) or, if it does not change these "
        "updates, pass only the state of the accelerated optimizer"
    )


def _is_transparent(link: PyTree) -> bool:
    """Whether the link of this state returns updates unchanged, at least in the mean."""
    if isinstance(link, optax.MaskedState):
        return _is_transparent(link.inner_state)
    if type(link) in (tuple, list):
        return all(map(_is_transparent, link))
    return isinstance(link, _TRANSPARENT)
