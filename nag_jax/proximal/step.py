"""The step of proximal gradient descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nag_jax._arithmetic import cast_like, map_gradients, proximal_step
from nag_jax._checks import check_prox, check_range, check_trainable, given_params
from nag_jax._descent import at_count
from nag_jax._types import Prox, transformation


class ProxStepState(NamedTuple):
    """State of :func:`prox_step`."""

    step: jax.Array  # shape=(), int32


def prox_step(
    prox: Prox, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""The step of proximal gradient descent, :math:`u = \mathrm{prox}(p - \epsilon g) - p`.

    Use it instead of ``optax.sgd(learning_rate)``; with the identity as prox the two are the same.
    Momentum comes after it. The learning rate is given only here. The state is the same for a
    number and a schedule, so code that tunes the number may make a new ``prox_step(prox, lr)`` at
    each step and call its ``update``.

    Args:
      prox: ``(tree, step) -> tree``, from this module or your own. Its tree has at least float32;
        it returns the same structure and shapes. Wrap a projection in :func:`projection`, and a
        prox of jaxopt, which takes its strength before the step, as
        ``lambda x, step: jaxopt.prox.prox_lasso(x, 0.1, step)``.
      learning_rate: :math:`\epsilon`, at least 0, or a schedule of the integer step; 1/L for the
        bounds of the rules, L the smoothness of the loss without the penalty.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Under
      ``inject_hyperparams`` prox is a static argument.

    Raises:
      ValueError: if learning_rate is negative or prox does not take (tree, step); from init, for a
        parameter that is neither floating-point nor complex; from update, without params, or if
        prox returns another structure or other shapes.

    Example:
      The lasso. The iterate to evaluate is as sparse as the solution:

      >>> a = jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
      >>> b = jnp.array([2.0, -0.5, 0.1])
      >>> prox = nag_jax.proximal.l1(0.5)
      >>> optimizer = optax.chain(nag_jax.proximal.prox_step(prox, 0.3),
      ...                         nag_jax.accelerate(rules.fista()))
      >>> params = jnp.zeros(3)
      >>> state = optimizer.init(params)
      >>> for _ in range(100):
      ...     updates, state = optimizer.update(a.T @ (a @ params - b), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(jnp.round(nag_jax.eval_params(params, state), 2))
      [1.5 0.  0. ]

    References:
      Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems, SIAM J. Imaging Sciences 2, 2009. Parikh, Boyd, Proximal algorithms, Foundations
      and Trends in Optimization 1, 2014, section 4.2.
    """
    check_prox(prox)
    check_range("learning_rate", learning_rate, 0.0, schedule=True)

    def init(params: optax.Params) -> ProxStepState:
        check_trainable("a proximal step", params)
        return ProxStepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: ProxStepState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ProxStepState]:
        del extra_args
        params = given_params("prox_step", params)
        lr = at_count(learning_rate, jnp.asarray(state.step))
        steps = proximal_step(prox, updates, params, lr)
        updates = map_gradients(lambda g, u: cast_like(u, g), updates, steps)
        return updates, ProxStepState(jnp.asarray(optax.safe_increment(state.step)))

    return transformation(init, update)
