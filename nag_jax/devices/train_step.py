"""One update over all devices, by whichever of JAX's mechanisms the program already uses."""

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh

from nag_jax._arithmetic import wide
from nag_jax._checks import check_choice, check_count, check_optimizer
from nag_jax.devices import gradients
from nag_jax.devices.modes import Devices
from nag_jax.devices.placement import check_axis
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
      optimizer: any gradient transformation; use ``zero1(...)`` to split its state over the
        devices.
      mesh: with Auto or Explicit axes; None: all devices along one Auto axis.
      axis: the axis of the mesh over which the rows of a batch are spread.
      mode: "jit", "shard_map" or "pmap".
      accumulate: micro-batches that each device goes through one after the other, at least 1;
        gradients are summed in float32 at least, and all-reduced once.
      nonfinite: what to do when the loss or a gradient is not finite in any micro-batch on any
        device. Every device skips that update. "skip" counts it and continues. "raise" also skips
        all later updates and raises within 8 calls, since waiting for every step would stall the
        host; params and state are then those from before the bad batch, and ``step.resume(state)``
        continues from there.
      has_aux: loss_fn returns ``(loss, aux)``, or ``(loss, (model_state, aux))``; aux, a pytree of
        numbers, is averaged as the loss is, into ``metrics["aux"]``.
      weight: ``piece of the batch -> scalar``, what the loss is a mean over where that is not the
        rows: ``lambda batch: batch["mask"].sum()`` for padded rows or tokens. Without it a mean of
        means over pieces of different weight is not the mean. None: rows.

    A batch may have any number of rows: those that cannot be divided evenly over devices and
    micro-batches are computed by every device, and count once. Batch, parameters and state may lie
    anywhere, in NumPy arrays or on any devices; the step moves them to the mesh, even under
    ``jax.set_mesh`` of another mesh. Parameters and state that are split over another mesh are
    refused, since to gather them might exceed the memory. With several processes, each passes
    batches of global arrays (``jax.make_array_from_process_local_data``).

    Returns:
      A :class:`TrainStep`. Make the state by ``step.init(params)``. ``metrics`` has ``loss``,
      ``grad_norm``, ``skipped`` and ``aux``. Gradients of complex parameters are conjugated, so
      that descent descends.

    Raises:
      ValueError: for an unknown mode or policy, accumulate below 1, a mesh without that axis or an
        optimizer that is not one; from the step, for arrays that disagree in rows, and for
        parameters or state that are split in a way that the mode does not allow.
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
    check_count("accumulate", accumulate, static=True)
    check_optimizer("optimizer", optimizer)
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), (axis,), (AxisType.Auto,))
    check_axis(mesh, axis)
    if mode == "pmap" and (len(mesh.axis_names) > 1 or jax.process_count() > 1):
        raise ValueError(
            'mode="pmap" needs a mesh of one axis in one process, got axes '
            f'{mesh.axis_names} in {jax.process_count()}; use mode="jit" or "shard_map"'
        )
    if mode == "pmap":  # which has no axes of its own kind
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    loss = gradients.Loss(loss_fn, has_aux, weight)
    optimizer = optax.with_extra_args_support(optimizer)
    return TrainStep(loss, optimizer, Devices(mesh, axis, mode, accumulate), nonfinite)


class TrainStep:
    """What :func:`train_step` returns; call it as ``step(params, state, batch)``.

    Inside ``jax.jit`` or ``lax.scan`` it is a plain function: it donates nothing, raises nothing
    for numbers that are not finite (call :meth:`check` on the state afterwards), and cannot see
    that parameters are split over an Auto axis, which matters for memory with ``accumulate``. A
    mesh of ``jax.set_mesh`` there must be the mesh of the step.
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
        with self._context(params, model_state, rng):
            placed = self._devices.put(params)
            opt_state, zero = self._optimizer.init(placed), jnp.zeros([], jnp.int32)
            state = StepState(opt_state, model_state, rng, zero, zero, zero)
            return self._devices.put(state, apart_from=(params, placed, model_state, rng))

    def __call__(self, params: Any, state: StepState, batch: Any) -> tuple[Any, StepState, Any]:
        if _traced((params, state, batch)):
            if self._devices.mode == "pmap":
                raise ValueError(
                    'mode="pmap" cannot be called inside jit or scan; use mode="jit" or "shard_map"'
                )
            self._devices.check_traced((params, state, batch))
            params, state, main, extra = self._prepare(params, state, batch)
            split = self._devices.splits(params)
            return self._update(split, params, state, main, extra)[:3]
        if len(self._alarms) == _LATE:
            self._raise_if(self._alarms.popleft())
        with self._context():
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
        with self._context(state):
            self._raise_if(_alarm(state))

    def resume(self, state: StepState) -> StepState:
        """The state from which steps continue after one that was not finite.

        With ``nonfinite="raise"`` the step skips all updates after a non-finite one until then.

        Args:
          state: the last state that the step returned.

        Returns:
          The state with ``in_a_row`` set to 0; ``skipped`` still counts the skipped steps.

        >>> step = nag_jax.train_step(lambda p, batch: jnp.mean(batch * p), optax.sgd(0.5))
        >>> params = jnp.array(1.0)
        >>> params, state, _ = step(params, step.init(params), jnp.full(8, jnp.nan))
        >>> params, state, _ = step(params, step.resume(state), jnp.ones(8))
        >>> print(params, state.skipped)
        0.5 1
        """
        self._alarms.clear()
        with self._context(state):
            return state._replace(in_a_row=jnp.zeros_like(state.in_a_row))

    def lower(self, params: Any, state: StepState, batch: Any) -> Any:
        """The lowered program of one step, to look at its cost, memory and collectives."""
        with self._context():
            compiled, arguments = self._compile(params, state, batch)
            return compiled.lower(*arguments)

    def _context(self, *trees: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if _traced(trees) else self._devices.context()

    def _prepare(self, params: Any, state: StepState, batch: Any) -> tuple[Any, ...]:
        if not isinstance(state, StepState):
            raise ValueError(
                "state must come from step.init(params) or the last step, got "
                f"{type(state).__name__}"
            )
        return params, state, *self._devices.divide(batch)

    def _compile(self, params: Any, state: StepState, batch: Any) -> tuple[Any, Any]:
        """The compiled step, made once for each placement of params and state; its arguments."""
        params, state, main, extra = self._prepare(params, state, batch)
        leaves, structure = jax.tree.flatten((params, state))
        key = structure, tuple(getattr(x, "sharding", None) for x in leaves)
        # Of what a step returned all is known; anything else is looked at, and put on the mesh.
        if key not in self._compiled or len(set(map(id, leaves))) < len(leaves):
            split = self._devices.splits(params)
            params, state = self._devices.put((params, state))
            kept = jax.tree.map(self._devices.sharding, (params, state))
            key = structure, tuple(jax.tree.leaves(kept))
            if key not in self._compiled:
                update = functools.partial(self._update, split)
                self._compiled[key] = self._devices.compile(update, kept)
        return self._compiled[key], (params, state, main, extra)

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
        state = StepState(
            opt_state,
            model_state,
            state.rng,
            steps=jnp.asarray(optax.safe_increment(state.steps)),
            skipped=jnp.where(go, state.skipped, optax.safe_increment(state.skipped)),
            in_a_row=jnp.where(go, 0, optax.safe_increment(state.in_a_row)),
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
                'params and state are from before that step. Use nonfinite="skip" to skip such '
                "batches, or continue with step.resume(state)"
            )


def _traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


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
