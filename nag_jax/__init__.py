"""Nesterov acceleration in JAX: one buffer, one kernel, one rule per method."""

from nag_jax import proximal as proximal
from nag_jax import restart as restart
from nag_jax import rules as rules
from nag_jax import schedules as schedules
from nag_jax.adaptive import adanag as adanag
from nag_jax.auto import nag_auto as nag_auto
from nag_jax.averaging import averaged as averaged
from nag_jax.composite import optista as optista
from nag_jax.composite import pogm as pogm
from nag_jax.kernel import AccelerateState as AccelerateState
from nag_jax.kernel import OuterState as OuterState
from nag_jax.kernel import accelerate as accelerate
from nag_jax.kernel import eval_params as eval_params
from nag_jax.local import outer as outer
from nag_jax.local import resynchronize as resynchronize
from nag_jax.monotone import monotone_fista as monotone_fista
from nag_jax.optimizers import from_optax as from_optax
from nag_jax.optimizers import nag as nag
from nag_jax.optimizers import nag_then_sgd as nag_then_sgd
from nag_jax.parallel import StepState as StepState
from nag_jax.parallel import TrainStep as TrainStep
from nag_jax.parallel import train_step as train_step
from nag_jax.precision import int8_blocks as int8_blocks
from nag_jax.precision import stochastic_bfloat16 as stochastic_bfloat16
from nag_jax.precision import stochastic_rounding as stochastic_rounding
from nag_jax.recipes import diloco as diloco
from nag_jax.recipes import fista as fista
from nag_jax.recipes import lookahead as lookahead
from nag_jax.recipes import ogm as ogm
from nag_jax.recipes import snoo as snoo
from nag_jax.recipes import tmm as tmm
from nag_jax.sharding import Zero1State as Zero1State
from nag_jax.sharding import replicas_in_sync as replicas_in_sync
from nag_jax.sharding import zero1 as zero1
from nag_jax.solve import Reason as Reason
from nag_jax.solve import Result as Result
from nag_jax.solve import largest_curvature as largest_curvature
from nag_jax.solve import minimize as minimize
from nag_jax.stepsize import backtracking as backtracking

__version__ = "0.1.0"
