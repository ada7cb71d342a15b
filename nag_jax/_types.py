"""The types in the signatures of the library, under one name each."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, Union, cast

import jax
import optax
from jax.tree_util import KeyPath as KeyPath
from jax.typing import ArrayLike as ArrayLike
from jax.typing import DTypeLike as DTypeLike
from optax import OptState as OptState
from optax import Params as Params
from optax import Updates as Updates

if TYPE_CHECKING:  # these modules import this one
    from nag_jax.precision.storage import Storage
    from nag_jax.restart.decision import Seen

# Trees. Optax's Params, Updates and OptState are preferred where a tree is one of them.
PyTree: TypeAlias = Any  # a tree of any nodes and leaves, such as a batch
Tree = TypeVar("Tree")  # a tree that a function returns with the same structure
Leaf: TypeAlias = ArrayLike | jax.ShapeDtypeStruct  # of params; init also takes abstract ones
Mask: TypeAlias = PyTree | Callable[[Params], PyTree]  # of bools; a prefix of params

# Numbers.
Scalar: TypeAlias = float | jax.Array  # shape=(); a float is a constant of the compiled program
BufferDType: TypeAlias = Union[DTypeLike, "Storage", None]  # a Storage only here

# Devices.
AxisName: TypeAlias = Hashable  # of shard_map, pmap or vmap; a tuple names several axes

# Functions. A prox gets a float as its step where the learning rate is one.
Prox: TypeAlias = Callable[[PyTree, Scalar], PyTree]
Condition: TypeAlias = Callable[["Seen"], tuple[ArrayLike, ArrayLike]]
RestartLike: TypeAlias = Literal["gradient", "value", "speed"] | Condition | None
LossFn: TypeAlias = Callable[..., ArrayLike | tuple[ArrayLike, PyTree]]  # of params and a batch

# Closed choices; ``typing.get_args`` gives the strings.
Convention: TypeAlias = Literal["optax", "sutskever"]
Decay: TypeAlias = Literal["coupled", "decoupled"]
Evaluate: TypeAlias = Literal["average", "iterate"]
Mode: TypeAlias = Literal["jit", "shard_map", "pmap"]
NonFinite: TypeAlias = Literal["raise", "skip"]
Reduction: TypeAlias = Literal["mean", "sum"]

State = TypeVar("State")


class Update(Protocol[State]):
    """The ``update`` of a gradient transformation with this type of state."""

    def __call__(
        self,
        updates: Updates,
        state: State,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, State]: ...


def transformation(
    init: Callable[[Params], State], update: Update[State]
) -> optax.GradientTransformationExtraArgs:
    """``optax.GradientTransformationExtraArgs(init, update)``.

    Optax declares that ``update`` takes any tree as its state. Here the type checker compares
    the state that ``update`` takes and returns with the one that ``init`` returns.
    """
    return optax.GradientTransformationExtraArgs(
        cast(optax.TransformInitFn, init), cast(optax.TransformUpdateExtraArgsFn, update)
    )
