"""One update over all devices, by whichever of JAX's mechanisms the program already uses."""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh

from nag_jax._arithmetic import wide
from nag_jax._checks import check_choice
from nag_jax.devices import gradients
from nag_jax.devices.modes import Devices
from nag_jax.devices.zero1 import check_axis
from nag_jax.evaluation import evaluated

_LATE = 8  # steps between a non-finite one and the error: how far the host may run ahead


class StepState(NamedTuple):
    """What :func:`train_step` carries beside the parameters."""

    opt_state: Any  # of the optimizer
    model_state: Any  # as given to init: BatchNorm statistics, ...
    rng: Any  # key as given to init; never changes
    steps: jax.Array  # calls so far, shape=(), int32
    skipped: jax.Array  # of these, left out as not finite, shape=(), int32
    in_a_row: jax.Array  # left out since the last update, shape=(), int32

    def iterate(self, params: Any) -> Any:
        """Returns the iterate that the optimizer's state knows, for ``eval_params``."""
        return evaluated(params, self.opt_state)


def train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    mode: str = "jit",
    accumulate: int = 1,
    nonfinite: str = "raise",
    has_aux: bool = False,
    weight: Callable[[Any], Any] | None = None,
) -> "TrainStep":
    r"""One update of the parameters from a batch whose rows are shared by all devices.

    ``step(params, state, batch) -> (params, state, metrics)`` is compiled once, donates params and
    state, and makes in each mode the update of the whole batch on one device,

    .. math:: g = \frac{\sum_i w_i \nabla f_i(p)}{\sum_i w_i}

    over the devices' and micro-batches' pieces i of the batch, with their rows as weights.
    The optimizer sees g alone, so clipping, restarts and line searches (which are given ``value``,
    ``grad`` and ``value_fn`` of the whole batch) need to know nothing of devices.

    ===============  =============================================================================
    ``mode``         what ``loss_fn`` sees, and where parameters may lie
    ===============  =============================================================================
    ``"jit"``        the whole batch; XLA divides the work. Parameters whole, or split over any
                     axes of the mesh (FSDP, tensor parallelism). With ``accumulate`` above 1 and
                     whole parameters: as "shard_map".
    ``"shard_map"``  a device's rows, and ``axis`` for collectives of its own (BatchNorm over all
                     devices). Parameters whole along ``axis``.
    ``"pmap"``       as "shard_map", for programs of that time: one axis, one process, not inside
                     other transformations.
    ===============  =============================================================================

    Args:
      loss_fn: ``(params, batch) -> loss``, a mean over the rows of the batch it gets. Called with
        ``model_state=`` and ``rng=`` too if ``init`` was given them, and then returns
        ``(loss, model_state)``; the floating leaves of that are averaged over devices. Each
        micro-batch, device and step has an rng of its own. What the loss does must not depend on
        how many rows there are.
      optimizer: any gradient transformation; ``zero1(...)`` to split its state over the devices.
      mesh: with Auto or Explicit axes; None: all devices along one Auto axis.
      axis: the axis of the mesh over which the rows of a batch are spread.
      mode: "jit", "shard_map" or "pmap".
      accumulate: micro-batches that each device goes through one after the other, at least 1;
        gradients are summed in float32 at least, and all-reduced once.
      nonfinite: what a loss or gradient that is not finite leads to, in any micro-batch on any
        device. That update is left out on all devices in either case: "skip" counts it and goes
        on; "raise" leaves out all later ones too and raises at most 8 calls later, so that the
        host need not wait for each step, with params and state of before the bad batch.
      has_aux: loss_fn returns ``(loss, aux)``, or ``(loss, (model_state, aux))``; aux, a pytree of
        numbers, is averaged as the loss is, into ``metrics["aux"]``.
      weight: ``piece of the batch -> scalar``, what the loss is a mean over where that is not the
        rows: ``lambda batch: batch["mask"].sum()`` for padded rows or tokens. Without it a mean of
        means over pieces of different weight is not the mean. None: rows.

    A batch may have any number of rows: those that cannot be divided evenly over devices and
    micro-batches are computed by every device, and count once. Arrays are put on the mesh as
    needed; of several processes each passes global arrays
    (``jax.make_array_from_process_local_data``).

    Returns:
      A :class:`TrainStep`. Make the state by ``step.init(params)``. ``metrics`` has ``loss``,
      ``grad_norm``, ``skipped`` and ``aux``. Gradients of complex parameters are conjugated, so
      that descent descends.

    Raises:
      ValueError: for an unknown mode or policy, accumulate below 1, a mesh without that axis, and,
        from the step, for arrays that disagree in rows or lie where the mode does not allow it.
      FloatingPointError: from the step, with ``nonfinite="raise"``.

    The point: the same numbers, whatever the mechanism and the number of devices.

    >>> x = jax.random.normal(jax.random.key(0), (63, 3))
    >>> batch = {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}
    >>> loss = lambda p, batch: jnp.mean((batch["x"] @ p - batch["y"]) ** 2)
    >>> for mode in ("jit", "shard_map", "pmap"):
    ...     step = nag_jax.train_step(loss, nag_jax.nag(0.05), mode=mode)
    ...     params = jnp.zeros(3)
    ...     state = step.init(params)
    ...     for _ in range(100):
    ...         params, state, metrics = step(params, state, batch)
    ...     print([f"{value:.3f}" for value in params])
    ['1.000', '-2.000', '0.500']
    ['1.000', '-2.000', '0.500']
    ['1.000', '-2.000', '0.500']
    """
    check_choice("mode", mode, ("jit", "shard_map", "pmap"))
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be an int of at least 1, got {accumulate!r}")
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), (axis,), (AxisType.Auto,))
    check_axis(mesh, axis)
    if mode == "pmap" and (len(mesh.axis_names) > 1 or jax.process_count() > 1):
        raise ValueError(
            'mode="pmap" needs a mesh of one axis in one process, got axes '
            f'{mesh.axis_names} in {jax.process_count()}; use mode="jit" or "shard_map"'
        )
    loss = gradients.Loss(loss_fn, has_aux, weight)
    optimizer = optax.with_extra_args_support(optimizer)
    return TrainStep(loss, optimizer, Devices(mesh, axis, mode, accumulate), nonfinite)


class TrainStep:
    """What :func:`train_step` returns; call it as ``step(params, state, batch)``.

    Inside ``jax.jit`` or ``lax.scan`` it is a plain function: it donates nothing, raises nothing
    for numbers that are not finite (call :meth:`check` on the state afterwards), and cannot see
    that parameters are split over an Auto axis, which matters for memory with ``accumulate``.
    """

    def __init__(
        self,
        loss: gradients.Loss,
        optimizer: optax.GradientTransformationExtraArgs,
        devices: Devices,
        nonfinite: str,
    ):
        self._loss, self._optimizer, self._devices = loss, optimizer, devices
        self._raises = nonfinite == "raise"
        self._compiled: dict[Any, Any] = {}
        self._alarms: collections.deque[jax.Array] = collections.deque()

    def init(self, params: Any, *, model_state: Any = None, rng: Any = None) -> StepState:
        """The state before the first step, on the mesh; state of split parameters is split alike.

        Args:
          params: as will be trained.
          model_state: what the model changes by itself, such as BatchNorm statistics.
          rng: a key of ``jax.random``; step, device and micro-batch are folded into it.
        """
        placed = self._devices.put(params)
        opt_state, zero = self._optimizer.init(placed), jnp.zeros([], jnp.int32)
        state = StepState(opt_state, model_state, rng, zero, zero, zero)
        return self._devices.put(state, apart_from=(params, placed, model_state, rng))

    def __call__(self, params: Any, state: StepState, batch: Any) -> tuple[Any, StepState, Any]:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, state, batch))):
            if self._devices.mode == "pmap":
                raise ValueError(
                    'mode="pmap" cannot be called inside jit or scan; use mode="jit" or "shard_map"'
                )
            return self._update(*self._prepare(params, state, batch))[:3]
        if len(self._alarms) == _LATE:
            self._raise_if(self._alarms.popleft())
        compiled, arguments = self._compile(params, state, batch)
        params, state, metrics, alarm = compiled(*arguments)
        if self._raises:
            self._alarms.append(alarm)
        return params, state, metrics

    def check(self, state: StepState) -> None:
        """Waits for the state, and raises if its last steps were left out as not finite.

        For the end of training, before a checkpoint, and after a scan of steps.

        Raises:
          FloatingPointError: naming the step.
        """
        self._raise_if(_alarm(state))

    def lower(self, params: Any, state: StepState, batch: Any) -> Any:
        """The lowered program of one step, to look at its cost, memory and collectives."""
        compiled, arguments = self._compile(params, state, batch)
        return compiled.lower(*arguments)

    def _prepare(self, params: Any, state: StepState, batch: Any) -> tuple[Any, ...]:
        if not isinstance(state, StepState):
            raise ValueError(
                "state must come from step.init(params) or the last step, got "
                f"{type(state).__name__}"
            )
        return self._devices.splits(params), params, state, *self._devices.divide(batch)

    def _compile(self, params: Any, state: StepState, batch: Any) -> tuple[Any, Any]:
        """The compiled step, made once for each way to divide a batch, and its arguments."""
        split, *arguments = self._prepare(params, state, batch)
        even = gradients.rows(batch) % self._devices.count == 0
        key = split, even, jax.tree.structure(arguments)
        if key not in self._compiled:
            update = functools.partial(self._update, split)
            arguments[:2] = self._devices.put(arguments[:2])
            self._compiled[key] = self._devices.compile(update, *arguments)
        return self._compiled[key], arguments

    def _update(
        self, split: bool, params: Any, state: StepState, main: Any, extra: Any
    ) -> tuple[Any, StepState, Any, jax.Array]:
        """``(params, state, metrics, alarm)``."""
        key = None if state.rng is None else jax.random.fold_in(state.rng, state.steps)
        mean = lambda params, gradient: self._devices.mean(
            self._loss, split, params, state.model_state, key, main, extra, gradient
        )
        loss, gradient, aux, model_state = mean(params, True)
        # By itself, though the norm would tell: where the gradient is split, XLA joins sums over
        # devices in the order of use, and sums of squares between them would keep them apart.
        finite = jnp.isfinite(loss) & jnp.all(
            jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)])
        )
        norm = optax.tree.norm(jax.tree.map(wide, gradient))
        go = finite & (state.in_a_row == 0) if self._raises else finite

        def changed() -> tuple[Any, Any, Any]:
            updates, opt_state = self._optimizer.update(
                gradient, state.opt_state, params, value=loss, grad=gradient, value_fn=_value(mean)
            )
            return optax.apply_updates(params, updates), opt_state, model_state

        params, opt_state, model_state = self._select(
            go, changed, (params, state.opt_state, state.model_state)
        )
        left_out = 1 - go.astype(jnp.int32)
        state = StepState(
            opt_state,
            model_state,
            state.rng,
            steps=state.steps + 1,
            skipped=state.skipped + left_out,
            in_a_row=(state.in_a_row + 1) * left_out,
        )
        metrics = {"loss": loss, "grad_norm": norm, "skipped": state.skipped}
        return params, state, metrics | ({"aux": aux} if self._loss.has_aux else {}), _alarm(state)

    def _select(self, condition: jax.Array, new: Callable[[], Any], old: Any) -> Any:
        """``new()`` where the condition holds, else ``old``."""
        # On CPU a branch is free, a select of all arrays is not; elsewhere a branch waits for the
        # host.
        if self._devices.on_cpu:
            return jax.lax.cond(condition, new, lambda: old)
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new(), old)

    def _raise_if(self, alarm: Any) -> None:
        step = int(alarm)
        if step >= 0:
            self._alarms.clear()
            raise FloatingPointError(
                f"the loss or gradient of step {step} (from 0) is not finite on some device; "
                "params and state are those before it. To leave such batches out use "
                'nonfinite="skip"; to go on from here, state._replace(in_a_row=0 * state.in_a_row)'
            )


def _alarm(state: StepState) -> jax.Array:
    """The first of the steps left out last; -1 if the last one was not."""
    return jnp.where(state.in_a_row > 0, state.steps - state.in_a_row, -1)


def _value(mean: Callable[[Any, bool], gradients.Mean]) -> Callable[[Any], jax.Array]:
    """The loss of the batch as a function of params, whose gradient is right in every mode."""

    @jax.custom_vjp
    def value(params: Any) -> jax.Array:
        return mean(params, False).loss

    def forward(params: Any) -> tuple[jax.Array, Any]:
        both = mean(params, True)
        return both.loss, both.gradient

    def backward(gradient: Any, slope: jax.Array) -> tuple[Any]:
        return (jax.tree.map(lambda g: (slope * jnp.conj(g)).astype(g.dtype), gradient),)

    value.defvjp(forward, backward)
    return value
