"""What most people call: ``nag``, its hand-over to plain SGD, and the way there from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nag_jax import rules
from nag_jax._checks import check_choice, check_mask, check_range, given_params
from nag_jax._descent import at_count, scaled
from nag_jax.kernel import AccelerateState, BeforeLearningRateState, accelerate
from nag_jax.rules.rule import check_momentum, scalar


def nag(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    convention: str = "optax",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    decay: str = "coupled",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with Nesterov's accelerated gradient (NAG).

    With gradient :math:`g_t`, learning rate :math:`\epsilon_t` and momentum :math:`\mu_t`:

    * ``convention="optax"`` is ``optax.sgd(learning_rate, momentum, nesterov=True)`` and
      ``torch.optim.SGD(nesterov=True)``, schedules included (there a schedule of momentum is set
      through ``inject_hyperparams`` or the parameter group):

      .. math::
          b_{t+1} = \mu_t b_t + g_t, \qquad
          y_{t+1} = y_t - \epsilon_t (g_t + \mu_t b_{t+1})

      Exact Nesterov while learning rate and momentum are constant. (At a momentum of exactly 0
      PyTorch leaves b as it was; optax and this do not.)
    * ``convention="sutskever"`` is exact Nesterov under any schedule of both, as in the 2013
      paper (and in Keras, while momentum is constant):

      .. math::
          x_{t+1} = y_t - \epsilon_t g_t, \qquad
          y_{t+1} = x_{t+1} + \mu_{t+1} (x_{t+1} - x_t)

    Both keep y as params, where gradients are taken; ``eval_params(params, state)`` is x, exact
    in both. After a drop of the learning rate "optax" shrinks the next update with it, while
    "sutskever" coasts on the old velocity for about :math:`1/(1-\mu)` steps.

    Args:
      learning_rate: at least 0, or a schedule of the integer step; it may start at 0. The
        effective step size is learning_rate/(1 - momentum).
      momentum: in [0, 1), or a schedule of the integer step (see ``nag_jax.schedules``). In the
        formulas above t is that step. ``inject_hyperparams`` evaluates a schedule at t where
        "sutskever" would at t + 1: shift it by one there.
      convention: "optax" or "sutskever".
      weight_decay: at least 0, or a schedule of the integer step; per unit of learning rate.
      weight_decay_mask: a tree of bools that is a prefix of params, or a function params -> such a
        tree; True where to decay. None: everywhere. ``optax.inject_hyperparams`` takes a function
        for a schedule: name it in ``static_args=("weight_decay_mask",)`` there.
      decay: "coupled" adds weight_decay*params to the gradient, as PyTorch does, so momentum
        amplifies it to learning_rate*weight_decay/(1 - momentum) a step. "decoupled" shrinks
        params by exactly learning_rate*weight_decay a step, past the momentum.
      accumulator_dtype: floating or complex dtype of the buffer, or a storage that needs less
        memory, such as ``nag_jax.int8_blocks()``; None: the dtype of each parameter. Under
        ``optax.inject_hyperparams`` a static argument, too.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is an ``AccelerateState`` whatever
      the arguments. Its update needs ``params`` if there is weight decay, and then returns the
      wider dtype of gradients and params.

    Raises:
      ValueError: for numbers out of range or an unknown convention or decay, also when they come
        through ``optax.inject_hyperparams``. Traced values and schedules are not checked.

    The point: once something is scheduled the two are different methods. Here the learning rate
    halves every 10 steps, and only "sutskever" keeps the velocity it has gained:

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
    check_choice("convention", convention, ("optax", "sutskever"))
    check_choice("decay", decay, ("coupled", "decoupled"))
    before = convention == "optax"  # the momentum is before the learning rate
    rule = rules.trace(momentum, learning_rate) if before else rules.nesterov(momentum)
    # The learning rate is applied here, and is not another link of the chain.
    rule = rule._replace(before_learning_rate=False)
    kernel = accelerate(rule, accumulator_dtype=accumulator_dtype)
    # Only of a plain number is it known: inject_hyperparams passes arrays and tracers.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def decayed(updates: optax.Updates, by: Any, params: optax.Params | None) -> optax.Updates:
        params = given_params("nag with weight_decay", params)
        link = optax.add_decayed_weights(by, weight_decay_mask)
        return link.update(updates, link.init(params), params)[0]

    # One link, whose schedules all take the step that the kernel counts: so the state does not
    # depend on which arguments are numbers, arrays or schedules, or on the weight decay.
    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccelerateState]:
        del extra_args
        k = jnp.asarray(state.carry)
        rate, shrink = at_count(learning_rate, k), at_count(weight_decay, k)
        if decays and decay == "coupled":
            updates = decayed(updates, shrink, params)
        if not before:
            updates = scaled(updates, -rate)
        updates, state = kernel.update(updates, state)
        if decays and decay == "decoupled":
            updates = decayed(updates, shrink if before else -rate * shrink, params)
        if before:
            updates = scaled(updates, -rate)
        return updates, state

    return optax.GradientTransformationExtraArgs(kernel.init, update)


def nag_then_sgd(
    learning_rate: float,
    momentum: float = 0.9,
    *,
    switch_step: int,
    transition_steps: int = 0,
    sgd_learning_rate: float | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    decay: str = "coupled",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAG first, plain SGD from ``switch_step`` on, without a jump in the step size.

    Momentum falls linearly from ``momentum`` to 0 over the ``transition_steps`` before
    ``switch_step``, and the learning rate is :math:`\epsilon_t = a_t (1 - \mu_t)` with the
    effective step size :math:`a_t`, :math:`\epsilon/(1-\mu)` at first and ``sgd_learning_rate``
    at the end. NAG is exact on the way (``convention="sutskever"``), so the params of
    ``switch_step`` are the iterate itself: nothing is left in the buffer and no look-ahead point
    is mistaken for a result. From there the numbers are those of
    ``optax.sgd(sgd_learning_rate)``.

    Args:
      learning_rate: of NAG, at least 0.
      momentum: of NAG, in [0, 1).
      switch_step: the first step of plain SGD, at least 0.
      transition_steps: length of the hand-over in steps, up to switch_step; 0: all at once.
      sgd_learning_rate: of SGD. None: learning_rate/(1 - momentum), the same effective step size.
        On a curvature of L, SGD with that is stable only for learning_rate < 2(1 - momentum)/L,
        far below NAG's own limit of about 4/(3L): give a smaller one if it diverges.
      weight_decay: as in :func:`nag`; so are weight_decay_mask, decay and accumulator_dtype.
        "decoupled" decay follows the learning rate of each step, and so grows with it.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: for numbers out of range. Under ``optax.inject_hyperparams`` name
        switch_step and transition_steps in static_args.

    >>> optimizer = nag_jax.nag_then_sgd(0.01, 0.9, switch_step=1000, transition_steps=200)
    """
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        if callable(value):
            raise ValueError(
                f"{name} must be a number here, since the hand-over schedules it, got {value!r}; "
                "for schedules of your own take nag"
            )
    check_range("learning_rate", learning_rate, 0.0)
    check_momentum(momentum)
    check_range("switch_step", switch_step, 0, static=True)
    check_range("transition_steps", transition_steps, 0, switch_step + 1, static=True)
    momentum = scalar(momentum)
    effective = scalar(learning_rate) / (1 - momentum)
    target = effective if sgd_learning_rate is None else scalar(sgd_learning_rate)
    check_range("sgd_learning_rate", target, 0.0)
    length = max(transition_steps, 1)  # of an array, too, whose size no step under jit could tell

    def remaining(step: jax.typing.ArrayLike) -> jax.Array:
        left = (switch_step - jnp.asarray(step, float)) / length
        return jnp.clip(left, 0.0, 1.0)

    def mu(step: jax.typing.ArrayLike) -> jax.Array:
        return momentum * remaining(step)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
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


def from_optax(sgd_state: Any, *, step: int | None = None, readout: float = 0.0) -> Any:
    """Turns the state of ``optax.sgd(nesterov=True)`` into that of ``nag``, to train on with it.

    Training continues with the same numbers, for ``nag`` with the same arguments and the default
    convention. The state of each ``optax.sgd`` is replaced where it stands, so states inside
    ``optax.chain``, ``masked`` or ``MultiSteps`` convert too, for ``nag`` at the same place. An
    ``optax.trace`` that does not begin a chain becomes ``accelerate(rules.trace(momentum))`` there.
    An ``add_decayed_weights`` in the chain stays: do not give nag the weight decay instead. Under
    ``jax.vmap`` convert with ``jax.vmap(from_optax)``.

    Args:
      sgd_state: the state of ``optax.sgd(learning_rate, momentum, nesterov=True)``, or of a chain
        that holds it. A state of heavy ball (``nesterov=False``) looks the same and also converts,
        but nag goes on with Nesterov's update.
      step: steps made so far, for a momentum schedule. None: the step of sgd's learning-rate
        schedule if it has one, else 0.
      readout: learning_rate*momentum of the last step, which sgd's state does not hold; it lets
        ``eval_params`` be exact before the next update. With 0 it returns params until then.

    Returns:
      The state for ``nag``. It holds the buffers of sgd_state, not copies.

    Raises:
      ValueError: if sgd_state holds no momentum.

    >>> params, sgd = jnp.ones(2), optax.sgd(0.1, 0.9, nesterov=True)
    >>> _, state = sgd.update(params, sgd.init(params))
    >>> updates, _ = nag_jax.nag(0.1, 0.9).update(params, nag_jax.from_optax(state))
    >>> print(updates, sgd.update(params, state)[0])
    [-0.271 -0.271] [-0.271 -0.271]
    """
    is_trace = lambda node: isinstance(node, optax.TraceState)
    is_chain = lambda node: type(node) is tuple and any(map(is_trace, node))
    if not any(map(is_trace, jax.tree.leaves(sgd_state, is_leaf=is_trace))):
        raise ValueError(
            "sgd_state holds no optax.TraceState, got "
            f"{jax.tree.structure(sgd_state)}; pass the state of "
            "optax.sgd(learning_rate, momentum, nesterov=True)"
        )

    def convert(node: Any, k: Any = 0, kind: Any = BeforeLearningRateState) -> Any:
        if is_chain(node):
            counts = [s.count for s in node if isinstance(s, optax.ScaleByScheduleState)]
            k = counts[0] if counts else 0
            if is_trace(node[0]):  # sgd's own chain, of trace and learning rate
                return convert(node[0], k, AccelerateState)
            return tuple(convert(s, k) for s in node)
        if not is_trace(node):
            return node
        # Copied, since one array in two places of a state cannot be donated.
        carry = jnp.array(k if step is None else step, jnp.int32)
        return kind(m=node.trace, carry=carry, readout=jnp.array(readout, float))

    return jax.tree.map(convert, sgd_state, is_leaf=lambda n: is_trace(n) or is_chain(n))
