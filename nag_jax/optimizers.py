"""What most people call: ``nag`` and the recipes around it, each a short chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nag_jax import rules
from nag_jax._checks import check_choice, check_range
from nag_jax._rule import check_momentum, scalar
from nag_jax.kernel import AccelerateState, accelerate


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
      weight_decay_mask: a tree of bools, a prefix of params, or a function params -> such a tree;
        True where to decay. None: everywhere.
      decay: "coupled" adds weight_decay*params to the gradient, as PyTorch does, so momentum
        amplifies it to learning_rate*weight_decay/(1 - momentum) a step. "decoupled" shrinks
        params by exactly learning_rate*weight_decay a step, past the momentum.
      accumulator_dtype: floating dtype of the buffer, or a storage that needs less memory, such as
        ``nag_jax.int8_blocks()``; None: the dtype of each parameter.

    ``optax.inject_hyperparams`` takes every callable for a schedule: name accumulator_dtype and a
    callable weight_decay_mask in its static_args.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params`` if there is
      weight decay, and then returns the wider dtype of gradients and params.

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
    check_choice("convention", convention, ("optax", "sutskever"))
    check_choice("decay", decay, ("coupled", "decoupled"))
    descent = optax.scale_by_learning_rate(learning_rate)
    if convention == "optax":
        kernel = accelerate(
            rules.trace(momentum, learning_rate), accumulator_dtype=accumulator_dtype
        )
        links = [kernel, descent]
    else:
        kernel = accelerate(rules.nesterov(momentum), accumulator_dtype=accumulator_dtype)
        links = [descent, kernel]
    # Only a plain number can be told to be 0: inject_hyperparams passes arrays and tracers.
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.chain(*links)
    if decay == "coupled":
        return optax.chain(optax.add_decayed_weights(weight_decay, weight_decay_mask), *links)
    # Between kernel and learning rate, or after both: past the momentum in either case.
    rate = weight_decay if convention == "optax" else _product(learning_rate, weight_decay, -1.0)
    links.insert(links.index(kernel) + 1, optax.add_decayed_weights(rate, weight_decay_mask))
    return optax.chain(*links)


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

    The numbers go on as if nothing had happened, for ``nag`` with the same arguments and the
    default convention. Every ``optax.TraceState`` is replaced where it stands, so states inside
    ``optax.chain``, ``masked`` or ``MultiSteps`` convert too, for ``nag`` at the same place. An
    ``add_decayed_weights`` in the chain stays there: do not give nag the weight decay instead.
    Under ``jax.vmap`` convert with ``jax.vmap(from_optax)``.

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

    def convert(node: Any, k: Any = 0) -> Any:
        if is_chain(node):
            counts = [s.count for s in node if isinstance(s, optax.ScaleByScheduleState)]
            return tuple(convert(s, counts[0] if counts else 0) for s in node)
        if not is_trace(node):
            return node
        # Copied, since one array in two places of a state cannot be donated.
        carry = jnp.array(k if step is None else step, jnp.int32)
        return AccelerateState(m=node.trace, carry=carry, readout=jnp.array(readout, float))

    return jax.tree.map(convert, sgd_state, is_leaf=lambda n: is_trace(n) or is_chain(n))


def _product(
    a: optax.ScalarOrSchedule, b: optax.ScalarOrSchedule, c: float
) -> optax.ScalarOrSchedule:
    if not callable(a) and not callable(b):
        return c * a * b
    return lambda step: c * (a(step) if callable(a) else a) * (b(step) if callable(b) else b)
