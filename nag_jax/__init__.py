"""Nesterov's accelerated gradient and its relatives for JAX and Optax."""

from nag_jax import gaps as gaps
from nag_jax import proximal as proximal
from nag_jax import restart as restart
from nag_jax import rules as rules
from nag_jax import schedules as schedules
from nag_jax.devices.replicas_in_sync import replicas_in_sync as replicas_in_sync
from nag_jax.devices.train_step import StepState as StepState
from nag_jax.devices.train_step import TrainStep as TrainStep
from nag_jax.devices.train_step import train_step as train_step
from nag_jax.devices.zero1 import Zero1State as Zero1State
from nag_jax.devices.zero1 import zero1 as zero1
from nag_jax.evaluation import eval_params as eval_params
from nag_jax.kernel import AccelerateState as AccelerateState
from nag_jax.kernel import accelerate as accelerate
from nag_jax.methods._fragments import Meeting as Meeting
from nag_jax.methods._fragments import meeting as meeting
from nag_jax.methods._outer_state import OuterState as OuterState
from nag_jax.methods.adanag import adanag as adanag
from nag_jax.methods.averaged import averaged as averaged
from nag_jax.methods.backtracking import backtracking as backtracking
from nag_jax.methods.diloco import diloco as diloco
from nag_jax.methods.diloco import lookahead as lookahead
from nag_jax.methods.diloco import snoo as snoo
from nag_jax.methods.fista import fista as fista
from nag_jax.methods.fista import ogm as ogm
from nag_jax.methods.fista import tmm as tmm
from nag_jax.methods.monotone_fista import monotone_fista as monotone_fista
from nag_jax.methods.nag import from_optax as from_optax
from nag_jax.methods.nag import nag as nag
from nag_jax.methods.nag import nag_then_sgd as nag_then_sgd
from nag_jax.methods.nag_auto import nag_auto as nag_auto
from nag_jax.methods.outer import outer as outer
from nag_jax.methods.pogm_optista import optista as optista
from nag_jax.methods.pogm_optista import pogm as pogm
from nag_jax.methods.resynchronize import resynchronize as resynchronize
from nag_jax.minimize import History as History
from nag_jax.minimize import Reason as Reason
from nag_jax.minimize import Result as Result
from nag_jax.minimize import largest_curvature as largest_curvature
from nag_jax.minimize import minimize as minimize
from nag_jax.precision.int8_blocks import int8_blocks as int8_blocks
from nag_jax.precision.stochastic_bfloat16 import stochastic_bfloat16 as stochastic_bfloat16
from nag_jax.precision.stochastic_rounding import stochastic_rounding as stochastic_rounding
from nag_jax.precision.storage import Storage as Storage

__version__ = "0.1.0"

__all__ = [
    "AccelerateState",
    "History",
    "Meeting",
    "OuterState",
    "Reason",
    "Result",
    "StepState",
    "Storage",
    "TrainStep",
    "Zero1State",
    "__version__",
    "accelerate",
    "adanag",
    "averaged",
    "backtracking",
    "diloco",
    "eval_params",
    "fista",
    "from_optax",
    "gaps",
    "int8_blocks",
    "largest_curvature",
    "lookahead",
    "meeting",
    "minimize",
    "monotone_fista",
    "nag",
    "nag_auto",
    "nag_then_sgd",
    "ogm",
    "optista",
    "outer",
    "pogm",
    "proximal",
    "replicas_in_sync",
    "restart",
    "resynchronize",
    "rules",
    "schedules",
    "snoo",
    "stochastic_bfloat16",
    "stochastic_rounding",
    "tmm",
    "train_step",
    "zero1",
]


def __dir__() -> list[str]:
    return __all__
