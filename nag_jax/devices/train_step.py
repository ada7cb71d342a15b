"""A data-parallel training step with jit, shard_map or pmap."""

import collections
import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple, NotRequired, TypedDict, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh
from jax.stages import Lowered, Wrapped

from nag_jax._arithmetic import wide
from nag_jax._checks import check_choice, check_count, check_optimizer
from nag_jax._types import (
    ArrayLike,
    LossFn,
    Mode,
    NonFinite,
    OptState,
    Params,
    PyTree,
    Reduction,
    Tree,
    Updates,
)
from nag_jax.devices import gradients
from nag_jax.devices.modes import Devices, Pmapped
from nag_jax.devices.placement import check_axis, place
from nag_jax.devices.zero1 import Zero1
from nag_jax.evaluation import evaluated

_LATE = 8  # steps that the host may run ahead before it reads whether one was finite


class StepState(NamedTuple):
    """The state of :func:`train_step`: all that a step changes except the parameters."""

    opt_state: OptState
    model_state: PyTree  # such as BatchNorm statistics; None if init was given none
    rng: jax.Array | None  # the key given to init; never changes
    steps: jax.Array  # calls so far, shape=(), int32
    skipped: jax.Array  # of these, skipped as not finite, shape=(), int32
    in_a_row: jax.Array  # skipped since the last update, shape=(), int32

    def iterate(self, params: Params) -> Params:
        """Returns the iterate that the optimizer's state knows, for ``eval_params``."""
        return evaluated(params, self.opt_state)


class Metrics(TypedDict):
    """The third result of a step."""

    loss: jax.Array  # the mean over the batch, shape=(), float32 at least
    grad_norm: jax.Array  # of its gradient, shape=(), float32 at least
    skipped: jax.Array  # steps skipped so far, shape=(), int32
    aux: NotRequired[PyTree]  # the mean or sum over the batch, with has_aux


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    mode: Mode = "jit",
    accumulate: int = 1,
    nonfinite: NonFinite = "raise",
    has_aux: bool = False,
    aux: Reduction = "mean",
    weight: Callable[[PyTree], ArrayLike] | None = None,
) -> "TrainStep":
    r"""Makes a data-parallel training step with jit, shard_map or pmap.

    ``step(params, state, batch) -> (params, state, metrics)`` is compiled once and donates params
    and state. In each mode the update is that of the whole batch on one device: the optimizer gets

    .. math:: g = \frac{\sum_i w_i \nabla f_i(p)}{\sum_i w_i}

    for pieces i of the batch, one per device and micro-batch, with their numbers of rows as weights
    :math:`w_i`. Clipping, restarts and line searches see only g, and ``value``, ``grad`` and
    ``value_fn`` of the whole batch, so any optimizer works on any number of devices.

    ===============  =============================================================================
    ``mode``         what ``loss_fn`` sees, and how parameters may be placed
    ===============  =============================================================================
    ``"jit"``        the whole batch; XLA divides the work. Parameters may be whole, or split over
                     any axes of the mesh (FSDP, tensor parallelism). If ``accumulate`` is above 1
                     and parameters are whole, this is the same as "shard_map".
    ``"shard_map"``  the rows of one device. Collectives over ``axis`` are possible, as for
                     BatchNorm over all devices. Parameters must be whole along ``axis``.
    ``"pmap"``       the same as "shard_map", for older programs: one axis, one process, not
                     inside other transformations.
    ===============  =============================================================================

    A batch may have any number of rows. Rows that do not divide evenly over devices and
    micro-batches are computed by every device and count once. Batch, parameters and state may be
    NumPy arrays or on any devices; the step moves them to the mesh, even under ``jax.set_mesh`` of
    another mesh. Parameters or state that are split over another mesh are an error, since gathering
    them might exceed the memory. With several processes, each passes batches of global arrays
    (``jax.make_array_from_process_local_data``).

    Args:
      loss_fn: ``(params, batch) -> loss``, a mean over the rows of the batch it gets. If ``init``
        was given ``model_state`` or ``rng``, it gets them as keyword arguments. With a model state
        it returns ``(loss, model_state)``, and the floating leaves of the new model state are
        averaged over devices. The rng is different for each micro-batch, device and step. The loss
        of a row must not depend on the number of rows.
      optimizer: any gradient transformation; use ``zero1(...)`` to split its state over the
        devices.
      mesh: a mesh with Auto or Explicit axes; None: all devices along one Auto axis.
      axis: the axis of the mesh over which the rows of a batch are split.
      mode: "jit", "shard_map" or "pmap".
      accumulate: the number of micro-batches that each device computes in sequence, at least 1.
        Micro-batch i has the rows i, i + accumulate and so on, on any number of devices. Gradients
        are summed in at least float32 and reduced once.
      nonfinite: what to do when the loss or a gradient is not finite in any micro-batch on any
        device. Every device skips that update. "skip" counts it and continues. "raise" also skips
        all later updates and raises within 8 calls, since waiting for every step would stall the
        host; params and state are then those from before the bad batch, and ``step.resume(state)``
        continues from there.
      has_aux: whether loss_fn returns ``(loss, aux)``, or ``(loss, (model_state, aux))``. Aux is a
        pytree of numbers and returned as ``metrics["aux"]``.
      aux: how the aux of the pieces of a batch becomes that of the batch. "mean": averaged like the
        loss. "sum": added, for counts and sums over rows, such as the number of right answers.
      weight: ``piece of the batch -> scalar``, the number of samples of a piece if these are not
        its rows, such as ``lambda batch: batch["mask"].sum()`` for padded rows or tokens. Without
        it, pieces with different numbers of samples would have equal weights. None: rows.

    Returns:
      A :class:`TrainStep`. Make the state with ``step.init(params)``. ``metrics`` is a dict of
      ``loss``, ``grad_norm``, ``skipped`` and, with has_aux, ``aux``. Gradients of complex
      parameters are conjugated, as descent requires.

    Raises:
      ValueError: for an unknown mode, nonfinite or aux, accumulate below 1, a mesh without the axis
        or an optimizer that is not a gradient transformation; from the step, for arrays with
        different numbers of rows, and for parameters or state that are split in a way that the mode
        does not allow.
      FloatingPointError: from the step, with ``nonfinite="raise"``.

    Example:
      All modes give the same numbers, on any number of devices:

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
    check_choice("mode", mode, get_args(Mode))
    check_choice("nonfinite", nonfinite, get_args(NonFinite))
    check_choice("aux", aux, get_args(Reduction))
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
    if mode == "pmap":  # which has no axis types; modes.py may then assume Auto axes
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    loss = gradients.Loss(loss_fn, has_aux, weight, aux)
    optimizer = optax.with_extra_args_support(optimizer)
    return TrainStep(loss, optimizer, Devices(mesh, axis, mode, accumulate), nonfinite)


class TrainStep:
    """The result of :func:`train_step`; call it as ``step(params, state, batch)``.

    Inside ``jax.jit`` or ``lax.scan`` it is a plain function. It then donates nothing, does not
    raise for numbers that are not finite (call :meth:`check` on the state afterwards), and does not
    know whether parameters are split over an Auto axis, which with ``accumulate`` may need more
    memory. A mesh of ``jax.set_mesh`` must be the mesh of the step there.
    """

    def __init__(
        self,
        loss: gradients.Loss,
        optimizer: optax.GradientTransformationExtraArgs,
        devices: Devices,
        nonfinite: NonFinite,
    ):
        self._loss, self._optimizer, self._devices = loss, optimizer, devices
        self._raises = nonfinite == "raise"
        # By the structure and shardings of params and state.
        self._compiled: dict[Hashable, Wrapped | Pmapped] = {}
        # Results of the last steps that the host has not waited for.
        self._alarms: collections.deque[jax.Array] = collections.deque()

    def init(
        self, params: Params, *, model_state: PyTree = None, rng: jax.Array | None = None
    ) -> StepState:
        """Returns the state before the first step, on the mesh.

        Args:
          params: the parameters to train. Where they are split over the mesh, the optimizer's state
            is split in the same way.
          model_state: a pytree that the loss updates, such as BatchNorm statistics; None: none.
          rng: a key of ``jax.random``, into which step, device and micro-batch are folded; None:
            the loss takes no rng.

        Returns:
          A :class:`StepState`, which shares no buffer with the arguments.
        """
        with self._context(params, model_state, rng):
            # A step donates params and state, so no buffer may be in both.
            placed = self._devices.put(params)
            opt_state, zero = self._optimizer.init(placed), jnp.zeros([], jnp.int32)
            state = StepState(opt_state, model_state, rng, zero, zero, zero)
            return self._devices.put(state, apart_from=(params, placed, model_state, rng))

    def __call__(
        self, params: PyTree, state: StepState, batch: PyTree
    ) -> tuple[PyTree, StepState, Metrics]:
        """Makes one update.

        Args:
          params: the parameters; donated, so use the returned ones afterwards.
          state: the state of the last step or of :meth:`init`; donated too.
          batch: a pytree of arrays with the same number of rows.

        Returns:
          The new parameters, the new state and the metrics of this step.
        """
        if _traced((params, state, batch)):
            if self._devices.mode == "pmap":
                raise ValueError(
                    'mode="pmap" cannot be called inside jit or scan; use mode="jit" or "shard_map"'
                )
            self._devices.check_traced((params, state, batch))
            params, state, main, extra = self._prepare(params, state, batch)
            split = self._devices.splits(params)
            return self._update(split, params, state, main, extra)[:3]
        # Reading the result of an old step does not stall the devices.
        if len(self._alarms) == _LATE:
            self._raise_if(self._alarms.popleft())
        with self._context():
            compiled, arguments = self._compile(params, state, batch)
            params, state, metrics, alarm = compiled(*arguments)
        if self._raises:
            self._alarms.append(alarm)
        return params, state, metrics

    def check(self, state: StepState) -> None:
        """Waits for the state, and raises if its last step was skipped because it was not finite.

        Call it at the end of training, before a checkpoint and after a scan of steps.

        Args:
          state: the last state that the step returned.

        Raises:
          FloatingPointError: with the number of the first step that was skipped.
        """
        with self._context(state):
            self._raise_if(_alarm(state))

    def resume(self, state: StepState) -> StepState:
        """Returns the state from which training continues after a step that was not finite.

        With ``nonfinite="raise"`` all updates after such a step are skipped until this is called.

        Args:
          state: the last state that the step returned.

        Returns:
          The state with ``in_a_row`` set to 0; ``skipped`` still counts the skipped steps.

        Example:
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

    def lower(self, params: Params, state: StepState, batch: PyTree) -> Lowered:
        """Returns the lowered program of one step, for its cost, memory and collectives.

        With modes "jit" and "shard_map" the arrays may be abstract, ``jax.ShapeDtypeStruct``, and
        the mesh one of devices that are not there (``jax.experimental.topologies``). So a model can
        be checked against the memory of a device before anything is allocated.

        Args:
          params: the parameters of the step; abstract ones are whole if they have no sharding.
          state: the state of the step, of ``jax.eval_shape(step.init, params)`` for abstract
            parameters; its leaves are then whole unless they are given shardings.
          batch: the batch of the step; the rows of an abstract one must divide evenly.

        Returns:
          A ``jax.stages.Lowered``, as ``jax.jit(...).lower`` does.

        Raises:
          ValueError: for abstract arrays with mode "pmap", or whose rows do not divide evenly.

        Example:
          >>> step = nag_jax.train_step(lambda p, x: jnp.mean((x @ p) ** 2), nag_jax.nag(0.1))
          >>> params = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
          >>> batch = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
          >>> lowered = step.lower(params, jax.eval_shape(step.init, params), batch)
          >>> memory = lowered.compile().memory_analysis()
          >>> memory.alias_size_in_bytes > 2 * 4 * params.size  # parameters and momentum, donated
          True
        """
        with self._context():
            compiled, arguments = self._compile(params, state, batch)
            return compiled.lower(*arguments)

    def _context(self, *trees: PyTree) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if _traced(trees) else self._devices.context()

    def _prepare(
        self, params: Params, state: StepState, batch: PyTree
    ) -> tuple[Params, StepState, PyTree, PyTree]:
        """The arguments of the compiled step: the batch becomes its even part and the rest."""
        if not isinstance(state, StepState):
            raise ValueError(
                "state must come from step.init(params) or the last step, got "
                f"{type(state).__name__}"
            )
        return params, state, *self._devices.divide(batch)

    def _compile(
        self, params: Params, state: StepState, batch: PyTree
    ) -> tuple[Wrapped | Pmapped, tuple[PyTree, ...]]:
        """The step, compiled once for each placement of params and state, and its arguments."""
        params, state, main, extra = self._prepare(params, state, batch)
        leaves, structure = jax.tree.flatten((params, state))
        key = structure, tuple(getattr(x, "sharding", None) for x in leaves)
        # What a step returned has a known key and is on the mesh; all else is checked and moved. So
        # are trees in which one array occurs twice, since it cannot be donated twice.
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
        self, split: bool, params: Params, state: StepState, main: PyTree, extra: PyTree
    ) -> tuple[Params, StepState, Metrics, jax.Array]:
        """The new params and state, the metrics, and the alarm, see ``_alarm``."""
        key = None if state.rng is None else jax.random.fold_in(state.rng, state.steps)
        mean = lambda params, gradient, shardings=None: self._devices.mean(
            self._loss, split, params, state.model_state, key, main, extra, gradient, shardings
        )
        shardings = None
        if isinstance(self._optimizer, Zero1) and self._devices.mode != "pmap":
            shardings = self._optimizer.gradient_shardings(params, state.opt_state)
        loss, gradient, aux, model_state = mean(params, True, shardings)
        if shardings is not None:
            gradient = jax.tree.map(place, gradient, shardings)
        # Not by the norm, which is not finite either: where the gradient is split, XLA merges
        # adjacent sums over devices, and the sums of squares would separate them.
        finite = jnp.isfinite(loss) & jnp.all(
            jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)])
        )
        norm = optax.tree.norm(jax.tree.map(wide, gradient))
        go = finite & (state.in_a_row == 0) if self._raises else finite

        def changed() -> tuple[PyTree, OptState, PyTree]:
            # Line searches take the value, gradient and function of the whole batch.
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
        metrics = Metrics(loss=loss, grad_norm=norm, skipped=state.skipped)
        if self._loss.has_aux:
            metrics["aux"] = aux
        return params, state, metrics, _alarm(state)

    def _select(self, condition: jax.Array, new: Callable[[], Tree], old: Tree) -> Tree:
        """``new()`` if the condition holds, otherwise ``old``."""
        # On CPU a branch is free and a select of all arrays is not. On other devices a branch waits
        # for the host.
        if self._devices.on_cpu:
            return jax.lax.cond(condition, new, lambda: old)
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new(), old)

    def _raise_if(self, alarm: jax.Array) -> None:
        step = int(alarm)
        if step >= 0:
            self._alarms.clear()
            raise FloatingPointError(
                f"the loss or gradient of step {step} (from 0) is not finite on some device; "
                'params and state are from before that step. Use nonfinite="skip" to skip such '
                "batches, or continue with step.resume(state)"
            )


def _traced(tree: PyTree) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _alarm(state: StepState) -> jax.Array:
    """The number of the first step of those skipped without a break until now; -1 if none was."""
    return jnp.where(state.in_a_row > 0, state.steps - state.in_a_row, -1)


def _value(mean: Callable[[Params, bool], gradients.Mean]) -> Callable[[Params], jax.Array]:
    """The loss of the batch as a function of params, with the right gradient in every mode."""

    # JAX would differentiate the sum over devices as one more sum over devices.
    @jax.custom_vjp
    def value(params: Params) -> jax.Array:
        return mean(params, False).loss

    def forward(params: Params) -> tuple[jax.Array, Updates]:
        both = mean(params, True)
        return both.loss, both.gradient

    def backward(gradient: Updates, slope: jax.Array) -> tuple[Updates]:
        # Conjugated back, since the gradient is that of descent and JAX expects its own.
        return (jax.tree.map(lambda g: (slope * jnp.conj(g)).astype(g.dtype), gradient),)

    value.defvjp(forward, backward)
    return value
