"""Lookahead, SNOO and DiLoCo, as special cases of ``outer``."""

import optax

from nag_jax._checks import check_range
from nag_jax._descent import descent
from nag_jax._types import AxisName, DTypeLike
from nag_jax.methods.nag import nag
from nag_jax.methods.outer import outer


def lookahead(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule = 0.5,
    *,
    every: int = 5,
    slow_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead: after k steps of any optimizer, moves back part of the way to where they began.

    This is ``outer(inner, optax.sgd(learning_rate), every=every)``, see :func:`nag_jax.outer`.
    ``optax.lookahead`` is the same method on a pair of trees; here params are one plain tree, and
    ``eval_params`` gives the iterate to evaluate.

    Args:
      inner: the optimizer that makes the k steps, including its learning rate.
      learning_rate: of the slow weights, at least 0, usually below 1, or a schedule of the outer
        step.
      every: k, the number of inner steps per outer step, at least 1.
      slow_dtype: floating or complex dtype of the slow copy; None: that of each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``.

    Raises:
      ValueError: for numbers out of range, or an inner that is not a gradient transformation.

    Example:
      >>> optimizer = nag_jax.lookahead(optax.adam(1e-3))

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead optimizer: k steps forward, 1 step back, 2019,
      arXiv:1907.08610, algorithm 1.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    return outer(inner, descent(learning_rate), every=every, slow_dtype=slow_dtype)


def snoo(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule = 0.68,
    momentum: optax.ScalarOrSchedule = 0.37,
    *,
    every: int = 28,
    slow_dtype: DTypeLike | None = None,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SNOO: Nesterov's momentum on the displacement of k steps of any optimizer, on one worker.

    This is ``outer(inner, nag(learning_rate, momentum), every=every)`` with the defaults of the
    authors' code, see :func:`nag_jax.outer`. That code makes its first outer step after the first
    inner step; here it is made after k.

    Args:
      inner: the optimizer that makes the k steps, including its learning rate.
      learning_rate: of the outer step, at least 0, or a schedule of the outer step.
      momentum: of the outer step, in [0, 1), or a schedule of the outer step.
      every: k, the number of inner steps per outer step, at least 1.
      slow_dtype: floating or complex dtype of the slow copy and the outer momentum; None: that of
        each parameter.
      memory_kind: ``"pinned_host"`` for slow copy and outer momentum in the host's memory, which
        needs a static ``sync``; None: on the device.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``.

    Raises:
      ValueError: for numbers out of range, or an inner that is not a gradient transformation.

    Example:
      >>> optimizer = nag_jax.snoo(optax.adamw(1e-3))

    References:
      Kallusky, Rao, Nandavanam, Shi, SNOO: step-K Nesterov outer optimizer, 2025,
      arXiv:2510.15830.
    """
    return outer(
        inner,
        nag(learning_rate, momentum),
        every=every,
        slow_dtype=slow_dtype,
        memory_kind=memory_kind,
    )


def diloco(
    inner: optax.GradientTransformation,
    axis_name: AxisName,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    every: int = 500,
    slow_dtype: DTypeLike | None = None,
    fragments: int = 1,
    delay: int = 0,
    mixing: float = 0.0,
    weighted: bool = False,
    memory_kind: str | None = None,
    send_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo: workers train independently and synchronize every H steps by a Nesterov step.

    This is ``outer(inner, nag(learning_rate, momentum), every=every, axis_name=axis_name)``, see
    :func:`nag_jax.outer`, which explains the other options. In H steps the workers communicate one
    mean of a params-sized tree, in float32 or send_dtype. MuLoCo is
    ``diloco(optax.contrib.muon(...), axis_name)``; Streaming DiLoCo has fragments, a delay and a
    mixing of 0.5. The papers evaluate the slow copy, ``state.slow``; ``eval_params`` gives the
    Nesterov iterate that corresponds to it.

    Args:
      inner: the optimizer of each worker, including its learning rate; AdamW in the paper.
      axis_name: the axis or axes of the workers, inside ``shard_map``, ``pmap`` or ``vmap``.
      learning_rate: of the outer step, at least 0, or a schedule of the outer step.
      momentum: of the outer step, in [0, 1), or a schedule of the outer step.
      every: H, the number of inner steps per outer step, at least 1.
      slow_dtype: floating or complex dtype of the slow copy and the outer momentum; None: that of
        each parameter.
      fragments: P, the number of parts of the parameters that synchronize in turn, at least 1.
      delay: tau, the number of inner steps between sending and the outer step, from 0 to H - 1.
      mixing: alpha in [0, 1], the share of its own parameters that a worker keeps in an outer step.
      weighted: whether ``update`` takes ``weight``, the worker's weight in the mean.
      memory_kind: ``"pinned_host"`` for slow copy and outer momentum in the host's memory, which
        needs a static ``sync``; None: on the device.
      send_dtype: dtype in which displacements are sent, ``jnp.bfloat16``, ``jnp.int8`` or
        ``jnp.int4``, with error feedback; None: float32.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``.

    Raises:
      ValueError: as :func:`nag_jax.outer`, and if axis_name is None.

    Example:
      >>> optimizer = nag_jax.diloco(optax.adamw(1e-3), "workers")

    References:
      Douillard et al., DiLoCo: distributed low-communication training of language models, 2023,
      arXiv:2311.08105, algorithm 1 and section 3. Douillard et al., Streaming DiLoCo with
      overlapping communication, 2025, arXiv:2501.18512.
    """
    if axis_name is None:
        raise ValueError(
            "axis_name must be the axis of the workers in shard_map, pmap or vmap, got None; for "
            "one worker use nag_jax.snoo"
        )
    return outer(
        inner,
        nag(learning_rate, momentum),
        every=every,
        axis_name=axis_name,
        slow_dtype=slow_dtype,
        fragments=fragments,
        delay=delay,
        mixing=mixing,
        weighted=weighted,
        memory_kind=memory_kind,
        send_dtype=send_dtype,
    )
