r"""Proximal steps: constraints and non-smooth penalties at the head of a chain. ::

    chain(prox_step(l1(0.1), learning_rate), accelerate(rules.fista(), restart=restart.gradient))

A prox is a function ``(tree, step) -> tree``, the proximal operator of a penalty :math:`h`:

.. math:: \mathrm{prox}_\epsilon(v) = \arg\min_z h(z) + \frac{1}{2 \epsilon} \|z - v\|^2

with v the tree and :math:`\epsilon` the step. A constraint is the penalty that is 0 where it holds
and infinite elsewhere; its prox is the projection, whatever the step. ``params`` are the
extrapolated point, in general neither sparse nor feasible. The iterate of ``eval_params`` is, up to
the rounding of ``params - m``.
"""

from nag_jax._types import Prox as Prox
from nag_jax.proximal.constraints import box as box
from nag_jax.proximal.constraints import nonnegative as nonnegative
from nag_jax.proximal.constraints import projection as projection
from nag_jax.proximal.penalties import elastic_net as elastic_net
from nag_jax.proximal.penalties import group_l1 as group_l1
from nag_jax.proximal.penalties import l1 as l1
from nag_jax.proximal.step import ProxStepState as ProxStepState
from nag_jax.proximal.step import prox_step as prox_step
from nag_jax.proximal.structured import nuclear as nuclear
from nag_jax.proximal.structured import sorted_l1 as sorted_l1
from nag_jax.proximal.structured import total_variation as total_variation

__all__ = [
    "Prox",
    "ProxStepState",
    "box",
    "elastic_net",
    "group_l1",
    "l1",
    "nonnegative",
    "nuclear",
    "projection",
    "prox_step",
    "sorted_l1",
    "total_variation",
]


def __dir__() -> list[str]:
    return __all__
