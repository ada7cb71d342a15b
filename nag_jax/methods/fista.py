"""FISTA, the optimized gradient method and the triple momentum method, as whole optimizers."""

import optax

from nag_jax import rules
from nag_jax._checks import check_range
from nag_jax._descent import descent
from nag_jax._types import BufferDType, Prox, RestartLike, Scalar
from nag_jax.kernel import accelerate
from nag_jax.proximal import prox_step


def fista(
    learning_rate: optax.ScalarOrSchedule,
    prox: Prox | None = None,
    *,
    restart: RestartLike = "gradient",
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FISTA with adaptive restart, for convex problems with or without a penalty or constraint.

    .. math::
        x_{k+1} = \mathrm{prox}(y_k - \epsilon \nabla f(y_k)), \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)

    Params are y, in general neither sparse nor feasible; ``eval_params`` is x. Gradients must be
    exact: on mini-batches use ``nag`` or ``rules.srsgd``. ``nag_jax.minimize`` runs FISTA to a
    tolerance and finds the learning rate.

    Args:
      learning_rate: :math:`\epsilon`, at least 0, best 1/L (``nag_jax.largest_curvature``), or a
        schedule of the integer step that varies little (see ``rules.estimate_sequence``).
      prox: ``(tree, step) -> tree``, of a penalty or constraint, from ``nag_jax.proximal``; None:
        the problem is smooth.
      restart: "gradient", "value" (update then needs ``value=loss``), "speed", None for never, or
        a condition from ``nag_jax.restart``.
      accumulator_dtype: a dtype or storage of the buffer, see ``accelerate``; None: the dtype of
        each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params`` if there is a prox.
      Under ``inject_hyperparams`` prox, restart and accumulator_dtype are static arguments.

    Raises:
      ValueError: for a negative learning rate, a prox that does not take (tree, step) or an unknown
        restart.

    Example:
      Least squares under a constraint. The only number to choose is L:

      >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> loss = lambda p: jnp.sum((a @ p - b) ** 2) / 2
      >>> optimizer = nag_jax.fista(1 / 13, nag_jax.proximal.nonnegative())
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for _ in range(60):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print([f"{x:.4f}" for x in nag_jax.eval_params(params, state)])
      ['0.0000', '0.9091']

    References:
      Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems, SIAM J. Imaging Sciences 2, 2009. O'Donoghue, Candes, Adaptive restart for
      accelerated gradient schemes, 2012, arXiv:1204.3982.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    # Not optax.sgd: its state differs between a number and a schedule.
    head = descent(learning_rate) if prox is None else prox_step(prox, learning_rate)
    kernel = accelerate(rules.fista(), restart, accumulator_dtype=accumulator_dtype)
    return optax.chain(head, kernel)


def ogm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    restart: RestartLike = "gradient",
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimized gradient method with adaptive restart, for smooth convex problems.

    Its worst case without a restart is half that of FISTA. It needs a learning rate of at most 1/L,
    while FISTA tolerates slightly larger ones. For the recurrence see ``rules.ogm``.

    Args:
      learning_rate: at least 0, best 1/L, or a schedule of the integer step.
      restart: "gradient", "value" (update then needs ``value=loss``), "speed", None for never, or
        a condition from ``nag_jax.restart``.
      accumulator_dtype: a dtype or storage of the buffer, see ``accelerate``; None: the dtype of
        each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Under ``inject_hyperparams`` restart and
      accumulator_dtype are static arguments.

    Raises:
      ValueError: for a negative learning rate or an unknown restart.

    Example:
      >>> optimizer = nag_jax.ogm(0.1)  # L = 10

    References:
      Kim, Fessler, Optimized first-order methods for smooth convex minimization, 2014,
      arXiv:1406.5468. Kim, Fessler, Adaptive restart of the optimized gradient method for convex
      optimization, 2017, arXiv:1703.04641.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    kernel = accelerate(rules.ogm(), restart, accumulator_dtype=accumulator_dtype)
    return optax.chain(descent(learning_rate), kernel)


def tmm(
    learning_rate: optax.ScalarOrSchedule, q: Scalar, *, accumulator_dtype: BufferDType = None
) -> optax.GradientTransformationExtraArgs:
    """The triple momentum method, for smooth, strongly convex problems of known conditioning.

    It is the fastest method with constant coefficients, for a learning rate of at most 1/L and a q
    of at most mu/L. If mu is not known, use :func:`ogm` or :func:`fista`. For the recurrence see
    ``rules.tmm``.

    Args:
      learning_rate: at least 0, best 1/L, or a schedule of the integer step.
      q: strong convexity over smoothness, mu/L, in (0, 1].
      accumulator_dtype: a dtype or storage of the buffer, see ``accelerate``; None: the dtype of
        each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Under ``inject_hyperparams`` accumulator_dtype
      is a static argument.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> optimizer = nag_jax.tmm(0.1, q=1e-3)  # L = 10, mu = 0.01

    References:
      Van Scoy, Freeman, Lynch, The fastest known globally convergent first-order method for
      minimizing strongly convex functions, IEEE Control Systems Letters 2, 2018.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    return optax.chain(
        descent(learning_rate), accelerate(rules.tmm(q), accumulator_dtype=accumulator_dtype)
    )
