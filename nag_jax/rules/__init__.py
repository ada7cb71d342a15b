"""Rules: each Nesterov-type method as a few scalars per step, for :func:`nag_jax.accelerate`.

``rule.py`` defines the type of a rule. ``classical.py`` has Nesterov's own methods, ``optimal.py``
those with optimal worst-case bounds for exact gradients, and ``stochastic.py`` those for noisy
gradients and for averaging.
"""

from nag_jax.rules.classical import chambolle_dossal as chambolle_dossal
from nag_jax.rules.classical import estimate_sequence as estimate_sequence
from nag_jax.rules.classical import fista as fista
from nag_jax.rules.classical import nesterov as nesterov
from nag_jax.rules.classical import strongly_convex as strongly_convex
from nag_jax.rules.classical import trace as trace
from nag_jax.rules.optimal import item as item
from nag_jax.rules.optimal import lessard as lessard
from nag_jax.rules.optimal import ogm as ogm
from nag_jax.rules.optimal import ogm_g as ogm_g
from nag_jax.rules.optimal import robust_momentum as robust_momentum
from nag_jax.rules.optimal import sc_ogm as sc_ogm
from nag_jax.rules.optimal import tmm as tmm
from nag_jax.rules.rule import Coefficients as Coefficients
from nag_jax.rules.rule import Rule as Rule
from nag_jax.rules.rule import Scalar as Scalar
from nag_jax.rules.rule import at_step as at_step
from nag_jax.rules.rule import constant as constant
from nag_jax.rules.rule import first_step as first_step
from nag_jax.rules.rule import stability_limit as stability_limit
from nag_jax.rules.stochastic import accsgd as accsgd
from nag_jax.rules.stochastic import agnes as agnes
from nag_jax.rules.stochastic import ema_nesterov as ema_nesterov
from nag_jax.rules.stochastic import gpa as gpa
from nag_jax.rules.stochastic import heavy_ball as heavy_ball
from nag_jax.rules.stochastic import mass as mass
from nag_jax.rules.stochastic import qhm as qhm
from nag_jax.rules.stochastic import srsgd as srsgd

__all__ = [
    "Coefficients",
    "Rule",
    "Scalar",
    "accsgd",
    "agnes",
    "at_step",
    "chambolle_dossal",
    "constant",
    "ema_nesterov",
    "estimate_sequence",
    "first_step",
    "fista",
    "gpa",
    "heavy_ball",
    "item",
    "lessard",
    "mass",
    "nesterov",
    "ogm",
    "ogm_g",
    "qhm",
    "robust_momentum",
    "sc_ogm",
    "srsgd",
    "stability_limit",
    "strongly_convex",
    "tmm",
    "trace",
]


def __dir__() -> list[str]:
    return __all__
