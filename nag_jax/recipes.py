"""The family's methods by the names that people call them, each a short chain."""

from typing import Any

import optax

from nag_jax import restart as conditions
from nag_jax import rules
from nag_jax._checks import check_range
from nag_jax.kernel import accelerate
from nag_jax.local import outer
from nag_jax.optimizers import nag
from nag_jax.proximal import Prox, prox_step


def fista(
    learning_rate: optax.ScalarOrSchedule,
    prox: Prox | None = None,
    *,
    restart: Any = "gradient",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FISTA with adaptive restart: convex problems, smooth or with a penalty or constraint.

    .. math::
        x_{k+1} = \mathrm{prox}(y_k - \epsilon \nabla f(y_k)), \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)

    Params are y, in general neither sparse nor feasible; ``eval_params`` is x. Gradients must be
    exact: on mini-batches ``nag`` or ``rules.srsgd`` is the one to take. ``nag_jax.minimize`` runs
    it to a tolerance with the learning rate found.

    Args:
      learning_rate: :math:`\epsilon`, at least 0, best 1/L (``nag_jax.largest_curvature``), or a
        schedule of the integer step that varies little (see ``rules.estimate_sequence``).
      prox: of a penalty or constraint, from ``nag_jax.proximal``; None: none.
      restart: "gradient", "value" (update then needs ``value=loss``), "speed", None for never, or
        a condition from ``nag_jax.restart``.
      accumulator_dtype: of the buffer, as in ``accelerate``; None: that of each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its update needs ``params`` if there is a prox.
      Under ``inject_hyperparams`` prox, restart and accumulator_dtype are static arguments.

    Raises:
      ValueError: for a negative learning rate or an unknown restart.

    The point: least squares under a constraint, to rounding, knowing only L.

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
    head = (
        optax.scale_by_learning_rate(learning_rate)
        if prox is None
        else prox_step(prox, learning_rate)
    )
    kernel = accelerate(
        rules.fista(), restart=conditions.by_name(restart), accumulator_dtype=accumulator_dtype
    )
    return optax.chain(head, kernel)


def ogm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    restart: Any = "gradient",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimized gradient method with restart: smooth convex problems without a prox.

    Half of FISTA's worst case (without a restart), for a learning rate of exactly 1/L or below:
    unlike FISTA it has no slack above. See ``rules.ogm``.

    Args:
      learning_rate: at least 0, best 1/L, or a schedule of the integer step.
      restart: as in :func:`fista`; so is accumulator_dtype.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: for a negative learning rate or an unknown restart.

    >>> optimizer = nag_jax.ogm(0.1)  # L = 10

    References:
      Kim, Fessler, Optimized first-order methods for smooth convex minimization, 2014,
      arXiv:1406.5468. Kim, Fessler, Adaptive restart of the optimized gradient method for convex
      optimization, 2017, arXiv:1703.04641.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    kernel = accelerate(
        rules.ogm(), restart=conditions.by_name(restart), accumulator_dtype=accumulator_dtype
    )
    return optax.chain(optax.scale_by_learning_rate(learning_rate), kernel)


def tmm(
    learning_rate: optax.ScalarOrSchedule, q: Any, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The triple momentum method: smooth, strongly convex problems of known conditioning.

    The fastest of all with constant coefficients, for a learning rate of 1/L or below and a q not
    above the true one; if q is not known, :func:`ogm` or :func:`fista`. See ``rules.tmm``.

    Args:
      learning_rate: at least 0, best 1/L, or a schedule of the integer step.
      q: strong convexity over smoothness, mu/L, in (0, 1].
      accumulator_dtype: as in :func:`fista`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: for numbers out of range.

    >>> optimizer = nag_jax.tmm(0.1, q=1e-3)  # L = 10, mu = 0.01

    References:
      Van Scoy, Freeman, Lynch, The fastest known globally convergent first-order method for
      minimizing strongly convex functions, IEEE Control Systems Letters 2, 2018.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    return optax.chain(
        optax.scale_by_learning_rate(learning_rate),
        accelerate(rules.tmm(q), accumulator_dtype=accumulator_dtype),
    )


def lookahead(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule = 0.5,
    *,
    every: int = 5,
    slow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead: k steps of any optimizer forward, then part of the way back.

    ``outer(inner, optax.sgd(learning_rate), every=every)``. ``optax.lookahead`` is the same method
    with a pair of trees in place of params; the iterate to evaluate is ``eval_params``.

    Args:
      inner: the optimizer, learning rate included.
      learning_rate: of the slow weights, at least 0, usually below 1, or a schedule of the outer
        step.
      every: k, inner steps per outer step, at least 1.
      slow_dtype: as in ``outer``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: for numbers out of range.

    >>> optimizer = nag_jax.lookahead(optax.adam(1e-3))

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead optimizer: k steps forward, 1 step back, 2019,
      arXiv:1907.08610, algorithm 1.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    return outer(inner, optax.sgd(learning_rate), every=every, slow_dtype=slow_dtype)


def snoo(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule = 0.68,
    momentum: optax.ScalarOrSchedule = 0.37,
    *,
    every: int = 28,
    slow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SNOO: Nesterov's momentum on the displacement of k steps of any optimizer, on one worker.

    ``outer(inner, nag(learning_rate, momentum), every=every)``, with the defaults of the authors'
    code. That code makes its first outer step after the first inner one; here it is after k.

    Args:
      inner: as in :func:`lookahead`; so are every and slow_dtype.
      learning_rate: of the outer step, at least 0, or a schedule of the outer step.
      momentum: of the outer step, in [0, 1), or a schedule of the outer step.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: for numbers out of range.

    >>> optimizer = nag_jax.snoo(optax.adamw(1e-3))

    References:
      Kallusky, Rao, Nandavanam, Shi, SNOO: step-K Nesterov outer optimizer, 2025,
      arXiv:2510.15830.
    """
    return outer(inner, nag(learning_rate, momentum), every=every, slow_dtype=slow_dtype)


def diloco(
    inner: optax.GradientTransformation,
    axis_name: Any,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    every: int = 500,
    slow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo: workers train on their own and meet every H steps, in a Nesterov step.

    ``outer(inner, nag(learning_rate, momentum), every=every, axis_name=axis_name)``: what is
    communicated is one mean of a params-sized float32 tree in H steps. MuLoCo is
    ``diloco(optax.contrib.muon(...), axis_name)``. The paper evaluates the slow copy itself,
    ``state.slow``; ``eval_params`` is Nesterov's iterate that belongs to it.

    Args:
      inner: the optimizer of each worker, learning rate included; AdamW in the paper.
      axis_name: the axis or axes of the workers, inside ``shard_map``, ``pmap`` or ``vmap``.
      learning_rate: as in :func:`snoo`; so are momentum, every (H) and slow_dtype.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``.

    Raises:
      ValueError: for numbers out of range or no axis.

    >>> optimizer = nag_jax.diloco(optax.adamw(1e-3), "workers")

    References:
      Douillard et al., DiLoCo: distributed low-communication training of language models, 2023,
      arXiv:2311.08105, algorithm 1 and section 3.
    """
    if axis_name is None:
        raise ValueError(
            "axis_name must be the axis of the workers in shard_map, pmap or vmap, got None; for "
            "one worker take nag_jax.snoo"
        )
    return outer(
        inner,
        nag(learning_rate, momentum),
        every=every,
        axis_name=axis_name,
        slow_dtype=slow_dtype,
    )
