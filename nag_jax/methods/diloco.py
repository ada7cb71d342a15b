"""Lookahead, SNOO and DiLoCo: named optimizers with an outer step."""

from typing import Any

import optax

from nag_jax._checks import check_range
from nag_jax._descent import descent
from nag_jax.methods.nag import nag
from nag_jax.methods.outer import outer


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
    return outer(inner, descent(learning_rate), every=every, slow_dtype=slow_dtype)


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
