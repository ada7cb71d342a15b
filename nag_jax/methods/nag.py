"""The ``nag`` optimizer, its combination with plain SGD, and the conversion from optax."""

from collections.abc import Callable
from typing import cast, get_args

import jax
import jax.numpy as jnp
import optax

from nag_jax import rules
from nag_jax._checks import check_choice, check_mask, check_range, given_params
from nag_jax._descent import at_count, scaled
from nag_jax._types import (
    ArrayLike,
    BufferDType,
    Convention,
    Decay,
    Mask,
    OptState,
    Params,
    PyTree,
    Scalar,
    Updates,
    transformation,
)
from nag_jax.kernel import AccelerateState, BeforeLearningRateState, accelerate
from nag_jax.rules.rule import check_momentum, scalar


def nag(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    convention: Convention = "optax",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    decay: Decay = "coupled",
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with Nesterov's accelerated gradient (NAG).

    With gradient :math:`g_t`, learning rate :math:`\epsilon_t` and momentum :math:`\mu_t`:

    * ``convention="optax"`` is ``optax.sgd(learning_rate, momentum, nesterov=True)`` and
      ``torch.optim.SGD(nesterov=True)``, also under schedules (which those set for the momentum
      through ``inject_hyperparams`` or the parameter group):

      .. math::
          b_{t+1} = \mu_t b_t + g_t, \qquad
          y_{t+1} = y_t - \epsilon_t (g_t + \mu_t b_{t+1})

      This is Nesterov's method exactly while learning rate and momentum are constant. (At a
      momentum of exactly 0 PyTorch does not update b; optax and this function do.)
    * ``convention="sutskever"`` is Nesterov's method exactly under any schedule of both, as in the
      2013 paper (and in Keras, while momentum is constant):

      .. math::
          x_{t+1} = y_t - \epsilon_t g_t, \qquad
          y_{t+1} = x_{t+1} + \mu_{t+1} (x_{t+1} - x_t)

    In both, params are y, where gradients are taken, and ``eval_params(params, state)`` is exactly
    x. After a drop of the learning rate "optax" immediately takes smaller steps, while "sutskever"
    keeps most of its velocity for about :math:`1/(1-\mu)` steps.

    Args:
      learning_rate: at least 0, or a schedule of the integer step; it may start at 0. The
        effective step size is learning_rate/(1 - momentum).
      momentum: in [0, 1), or a schedule of the integer step, which is t in the formulas above (see
        ``nag_jax.schedules``). ``inject_hyperparams`` evaluates a schedule at t, while "sutskever"
        evaluates it at t + 1: shift the schedule by one step there.
      convention: "optax" or "sutskever".
      weight_decay: at least 0, or a schedule of the integer step; per unit of learning rate.
      weight_decay_mask: a tree of bools that is a prefix of params, or a function of params that
        returns one; True where to decay. None: everywhere. ``optax.inject_hyperparams`` mistakes a
        function for a schedule: name it in ``static_args=("weight_decay_mask",)`` there.
      decay: "coupled" adds weight_decay*params to the gradient, as PyTorch does, so momentum
        amplifies it to learning_rate*weight_decay/(1 - momentum) per step. "decoupled" shrinks
        params by exactly learning_rate*weight_decay per step and does not enter the momentum.
      accumulator_dtype: floating or complex dtype of the buffer, or a storage that needs less
        memory, such as ``nag_jax.int8_blocks()``; None: the dtype of each parameter. Under
        ``optax.inject_hyperparams`` it is a static argument.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is an ``AccelerateState`` for all
      arguments. Its update needs ``params`` if there is weight decay, and then returns the wider
      dtype of gradients and params.

    Raises:
      ValueError: for numbers out of range or an unknown convention or decay, also when they come
        through ``optax.inject_hyperparams``. Traced values and schedules are not checked.

    Example:
      Under a schedule the two conventions are different methods. The learning rate halves every 10
      steps here, and only "sutskever" keeps its velocity:

      >>> curvature = jnp.array([1.0, 0.01])
      >>> halving = optax.exponential_decay(0.9, 10, 0.5)
      >>> for convention in ("optax", "sutskever"):
      ...     optimizer = nag_jax.nag(halving, 0.9, convention=convention)
      ...     params = jnp.ones(2)
      ...     state = optimizer.init(params)
      ...     for _ in range(60):
      ...         updates, state = optimizer.update(curvature * params, state)
      ...         params = optax.apply_updates(params, updates)
      ...     x = nag_jax.eval_params(params, state)
      ...     print(f"{convention:10} {jnp.sum(curvature * x**2) / 2:.1e}")
      optax      6.8e-04
      sutskever  9.1e-05

    References:
      Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2),
      Soviet Mathematics Doklady 27, 1983. Sutskever, Martens, Dahl, Hinton, On the importance of
      initialization and momentum in deep learning, ICML 2013, equations 3-4. Loshchilov, Hutter,
      Decoupled weight decay regularization, 2017, arXiv:1711.05101.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    check_range("weight_decay", weight_decay, 0.0, schedule=True)
    check_mask("weight_decay_mask", weight_decay_mask)
    check_choice("convention", convention, get_args(Convention))
    check_choice("decay", decay, get_args(Decay))
    before = convention == "optax"  # the momentum is before the learning rate
    rule = rules.trace(momentum, learning_rate) if before else rules.nesterov(momentum)
    # The learning rate is applied by update below, so no other link of the chain does it.
    rule = rule._replace(before_learning_rate=False)
    kernel = accelerate(rule, accumulator_dtype=accumulator_dtype)
    init = cast(Callable[[Params], AccelerateState], kernel.init)
    # Only a Python number can be compared with 0: inject_hyperparams passes arrays and tracers.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def decayed(updates: Updates, by: Scalar, params: Params | None) -> Updates:
        params = given_params("nag with weight_decay", params)
        link = optax.add_decayed_weights(by, weight_decay_mask)
        return link.update(updates, link.init(params), params)[0]

    # All schedules take the step that the kernel counts, in one transformation instead of a chain.
    # The state is then the same tree for numbers, arrays and schedules, with or without decay.
    def update(
        updates: Updates,
        state: AccelerateState,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[Updates, AccelerateState]:
        del extra_args
        k = jnp.asarray(state.carry)
        rate, shrink = at_count(learning_rate, k), at_count(weight_decay, k)
        if decays and decay == "coupled":
            updates = decayed(updates, shrink, params)
        if not before:
            updates = scaled(updates, -rate)
        updates, new_state = kernel.update(updates, state)
        if decays and decay == "decoupled":
            # With "sutskever" updates have been multiplied by the learning rate already.
            updates = decayed(updates, shrink if before else -rate * shrink, params)
        if before:
            updates = scaled(updates, -rate)
        return updates, cast(AccelerateState, new_state)

    return transformation(init, update)


def nag_then_sgd(
    learning_rate: Scalar,
    momentum: Scalar = 0.9,
    *,
    switch_step: int,
    transition_steps: int = 0,
    sgd_learning_rate: Scalar | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    decay: Decay = "coupled",
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAG until ``switch_step``, then plain SGD, without a jump in the effective step size.

    Momentum :math:`\mu_t` falls linearly from ``momentum`` to 0 over the ``transition_steps``
    before ``switch_step``. The learning rate is :math:`\epsilon_t = a_t (1 - \mu_t)`, where the
    effective step size :math:`a_t` moves from :math:`\epsilon/(1-\mu)` to ``sgd_learning_rate``.
    The transition is exact (``convention="sutskever"``): when momentum reaches 0, params are the
    iterate. From there the updates are those of ``optax.sgd(sgd_learning_rate)``.

    Args:
      learning_rate: of NAG, a number of at least 0.
      momentum: of NAG, a number in [0, 1).
      switch_step: the first step of plain SGD, at least 0.
      transition_steps: the number of steps over which momentum falls, from 0 (all at once) to
        switch_step.
      sgd_learning_rate: of SGD, at least 0. None: learning_rate/(1 - momentum), the same effective
        step size. On a curvature of L, SGD is then stable only for
        learning_rate < 2(1 - momentum)/L, far below NAG's limit of about 4/(3L): give a smaller
        one if it diverges.
      weight_decay: at least 0, or a schedule of the integer step; per unit of learning rate, see
        :func:`nag`. With decay="decoupled" it is multiplied by the learning rate of each step, and
        so increases with it during the transition.
      weight_decay_mask: a tree of bools or a function of params, see :func:`nag`; None: decay
        everywhere.
      decay: "coupled" or "decoupled", see :func:`nag`.
      accumulator_dtype: a dtype or storage of the buffer, see :func:`nag`; None: the dtype of each
        parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is an ``AccelerateState``.

    Raises:
      ValueError: for numbers out of range or an unknown decay. Under ``optax.inject_hyperparams``
        name switch_step and transition_steps in static_args.

    Example:
      >>> optimizer = nag_jax.nag_then_sgd(0.01, 0.9, switch_step=1000, transition_steps=200)
    """
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        if callable(value):
            raise ValueError(
                f"{name} must be a number, since nag_then_sgd schedules it, got {value!r}; "
                "use nag for your own schedules"
            )
    check_range("learning_rate", learning_rate, 0.0)
    check_momentum(momentum)
    check_range("switch_step", switch_step, 0, static=True)
    check_range("transition_steps", transition_steps, 0, switch_step + 1, static=True)
    momentum = scalar(momentum)
    effective = scalar(learning_rate) / (1 - momentum)
    if sgd_learning_rate is None:
        target = effective
    else:
        check_range("sgd_learning_rate", sgd_learning_rate, 0.0)
        target = scalar(sgd_learning_rate)
    # Outside of remaining(), where under jit max could not compare an array.
    length = max(transition_steps, 1)

    def remaining(step: ArrayLike) -> jax.Array:
        left = (switch_step - jnp.asarray(step, float)) / length
        return jnp.clip(left, 0.0, 1.0)

    def mu(step: ArrayLike) -> jax.Array:
        return momentum * remaining(step)

    def rate(step: ArrayLike) -> jax.Array:
        # Divided by 1 - mu, it is linear between the two effective step sizes.
        return (target + (effective - target) * remaining(step)) * (1 - mu(step))

    return nag(
        rate,
        mu,
        convention="sutskever",
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        decay=decay,
        accumulator_dtype=accumulator_dtype,
    )


def from_optax(sgd_state: OptState, *, step: int | None = None, readout: float = 0.0) -> OptState:
    """Converts the state of ``optax.sgd(nesterov=True)`` to the state of :func:`nag`.

    ``nag`` with the same arguments and the default convention then continues the training with the
    same numbers. The state of each ``optax.sgd`` inside ``optax.chain``, ``masked`` or
    ``MultiSteps`` is replaced, for ``nag`` in the same position. An ``optax.trace`` that is not the
    first link of its chain is converted for ``accelerate(rules.trace(momentum))`` in its position.
    Keep an ``add_decayed_weights`` of the chain; do not pass the weight decay to nag instead. Under
    ``jax.vmap`` use ``jax.vmap(from_optax)``.

    Args:
      sgd_state: the state of ``optax.sgd(learning_rate, momentum, nesterov=True)``, or of a chain
        that contains it. The state of heavy ball (``nesterov=False``) is the same tree and is also
        converted, but nag continues with Nesterov's update.
      step: the number of steps made so far, for a momentum schedule. None: the step of sgd's
        learning-rate schedule, or 0 if it has none.
      readout: learning_rate*momentum of the last step, which is not in sgd's state. It makes
        ``eval_params`` exact before the next update; with 0 it returns params until then.

    Returns:
      The state for ``nag``. It holds the buffers of sgd_state, not copies.

    Raises:
      ValueError: if sgd_state holds no momentum.

    Example:
      >>> params, sgd = jnp.ones(2), optax.sgd(0.1, 0.9, nesterov=True)
      >>> _, state = sgd.update(params, sgd.init(params))
      >>> updates, _ = nag_jax.nag(0.1, 0.9).update(params, nag_jax.from_optax(state))
      >>> print(updates, sgd.update(params, state)[0])
      [-0.271 -0.271] [-0.271 -0.271]
    """
    is_trace = lambda node: isinstance(node, optax.TraceState)
    # The state of optax.chain is a plain tuple, other states are NamedTuples.
    is_chain = lambda node: type(node) is tuple and any(map(is_trace, node))
    if not any(map(is_trace, jax.tree.leaves(sgd_state, is_leaf=is_trace))):
        raise ValueError(
            "sgd_state holds no optax.TraceState, got "
            f"{jax.tree.structure(sgd_state)}; pass the state of "
            "optax.sgd(learning_rate, momentum, nesterov=True)"
        )

    def convert(
        node: PyTree, k: ArrayLike = 0, kind: type[AccelerateState] = BeforeLearningRateState
    ) -> PyTree:
        if is_chain(node):
            counts = [s.count for s in node if isinstance(s, optax.ScaleByScheduleState)]
            k = counts[0] if counts else 0
            # optax.sgd is a chain of trace and learning rate, which nag replaces as a whole.
            if is_trace(node[0]):
                return convert(node[0], k, AccelerateState)
            return tuple(convert(s, k) for s in node)
        if not is_trace(node):
            return node
        # A copy, since the count may also be in the rest of the state, and one array in two
        # places cannot be donated.
        carry = jnp.array(k if step is None else step, jnp.int32)
        return kind(m=node.trace, carry=carry, readout=jnp.array(readout, float))

    return jax.tree.map(convert, sgd_state, is_leaf=lambda n: is_trace(n) or is_chain(n))
