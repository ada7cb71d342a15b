"""outer with fragments, a delay, mixing, weights and its buffers in the host's memory."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from workers import AXIS, EVERY_WAY, over_workers

import nag_jax

SIZES = {"a": 4, "b": 3, "c": 5, "d": 2}
SLICES = {1: [slice(0, 14)], 2: [slice(0, 7), slice(7, 14)], 3: [slice(0, 7), slice(7, 12), slice(12, 14)],
          4: [slice(0, 4), slice(4, 7), slice(7, 12), slice(12, 14)]}  # fmt: skip
CASES = [  # fragments, delay, mixing, of a period of 7
    (1, 0, 0.0), (3, 0, 0.0), (1, 0, 0.25), (1, 3, 0.0), (1, 6, 0.5), (3, 2, 0.5), (4, 5, 0.5),
    (2, 1, 1.0), (3, 6, 0.0),
]  # fmt: skip


def tree(x):
    """Four leaves of the last axis of ``x``."""
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return dict(zip(SIZES, jnp.split(x, ends, axis=-1), strict=True))


def flat(tree):
    return np.concatenate([np.asarray(tree[name]) for name in SIZES], axis=-1)


def problem(count, dtype=jnp.float64):
    """Workers that disagree: params, curvatures and minima, a row each."""
    rng = np.random.default_rng(0)
    curvature = rng.uniform(0.1, 1.0, (count, 14))
    target, start = rng.standard_normal((count, 14)), rng.standard_normal(14)
    rows = np.tile(start, (count, 1)), curvature, target
    return tuple(tree(jnp.asarray(x, dtype)) for x in rows)


def step_of(optimizer, sync=None):
    def step(params, state, curvature, target, *weight):
        gradient = jax.tree.map(lambda p, c, t: c * (p - t), params, curvature, target)
        given = {"weight": weight[0]} if weight else {}
        updates, state = optimizer.update(gradient, state, params, sync=sync, **given)
        return optax.apply_updates(params, updates), state

    return step


def gradients(curvature, target):
    c, t = flat(curvature), flat(target)
    return [lambda p, i=i: c[i] * (p - t[i]) for i in range(len(c))]


def make(fragments=1, delay=0, mixing=0.0, **options):
    options = dict(every=7, axis_name=AXIS) | options
    return nag_jax.outer(
        optax.sgd(0.2), optax.sgd(0.7, 0.6, nesterov=True),
        fragments=fragments, delay=delay, mixing=mixing, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("fragments", "delay", "mixing"), CASES)
@pytest.mark.usefixtures("x64")
def test_fragments_delay_and_mixing_are_streaming_diloco(fragments, delay, mixing):
    start, curvature, target = problem(3)
    optimizer = make(fragments, delay, mixing)
    expected, shared, _ = reference.streaming_diloco(
        gradients(curvature, target), flat(start)[0], 40, rate=0.2, every=7,
        fragments=SLICES[fragments], delay=delay, mixing=mixing, learning_rate=0.7, momentum=0.6,
    )  # fmt: skip
    counted = over_workers(step_of(optimizer), "vmap", 3)

    @functools.partial(jax.jit, static_argnums=4)
    def told(params, state, curvature, target, sync):
        step = jax.vmap(step_of(optimizer, sync), axis_name=AXIS)
        return step(params, state, curvature, target)

    at = functools.partial(nag_jax.meeting, every=7, fragments=fragments, delay=delay)
    for name in ("counted", "told"):
        params, state = start, jax.vmap(optimizer.init)(start)
        for k in range(1, 41):
            if name == "told":
                params, state = told(params, state, curvature, target, at(k))
            else:
                params, state = counted(params, state, curvature, target)
            np.testing.assert_allclose(flat(params), expected[k], rtol=0, atol=1e-12)
            slow = flat(state.slow)
            np.testing.assert_allclose(slow, np.stack([shared[k]] * 3), rtol=0, atol=1e-12)
            x = jax.vmap(nag_jax.eval_params)(params, state)
            np.testing.assert_array_equal(flat(x), slow)  # SGD knows no other iterate
    assert np.max(np.abs(shared[-1] - shared[0])) > 0.1
