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
from nag_jax.methods import communication

SIZES = {"a": 4, "b": 3, "c": 5, "d": 2}
SLICES = {
    1: [slice(0, 14)],
    2: [slice(0, 7), slice(7, 14)],
    3: [slice(0, 7), slice(7, 12), slice(12, 14)],
    4: [slice(0, 4), slice(4, 7), slice(7, 12), slice(12, 14)],
}
CASES = [(1, 3, 0.0), (3, 2, 0.5)]  # fragments, delay, mixing; of rounds of 7 steps
MORE = [(1, 0, 0.0), (3, 0, 0.0), (1, 0, 0.25), (1, 6, 0.5), (4, 5, 0.5), (2, 1, 1.0), (3, 6, 0.0)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


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


@EVERY_WAY
def test_workers_in_programs_of_their_own(way):
    """Fragments, delay and weights under every mapping, against the reference."""
    start, curvature, target = problem(2, jnp.float32)
    optimizer = make(3, 2, 0.5, weighted=True)
    step, data = step_of(optimizer), (curvature, target)
    weighted = lambda p, s, data, w: step(p, s, *data, w)
    workers = over_workers(weighted, way, 2)
    weights = lambda t: np.array([1.0, 3.0 * (t % 4 > 0)])
    expected, shared, _ = reference.streaming_diloco(
        gradients(curvature, target), flat(start)[0], 25, rate=0.2, every=7, fragments=SLICES[3],
        delay=2, mixing=0.5, learning_rate=0.7, momentum=0.6, weights=weights,
    )  # fmt: skip
    params, state = start, jax.vmap(optimizer.init)(start)
    for k in range(1, 26):
        w = jnp.asarray(weights(k), jnp.float32)
        params, state = jax.block_until_ready(workers(params, state, data, w))
        np.testing.assert_allclose(flat(params), expected[k], rtol=0, atol=1e-5)
        for row in flat(state.slow):
            np.testing.assert_allclose(row, shared[k], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(*flat(state.slow))


@pytest.mark.parametrize(("fragments", "delay", "mixing"), [(1, 0, 0.0), (1, 0, 0.5), (3, 2, 0.5)])
@pytest.mark.usefixtures("x64")
def test_the_mean_is_weighted_and_a_round_without_workers_is_skipped(fragments, delay, mixing):
    start, curvature, target = problem(3)
    optimizer = make(fragments, delay, mixing, weighted=True)

    def weights(t):
        return [1.0, 0.5, 0.0] if t <= 14 else [0.0, 0.0, 0.0] if t <= 21 else [2.0, 0.0, 1.0]

    expected, shared, skipped = reference.streaming_diloco(
        gradients(curvature, target), flat(start)[0], 40, rate=0.2, every=7,
        fragments=SLICES[fragments], delay=delay, mixing=mixing, learning_rate=0.7, momentum=0.6,
        weights=weights,
    )  # fmt: skip
    workers = over_workers(step_of(optimizer), "vmap", 3)
    params, state = start, jax.vmap(optimizer.init)(start)
    for k in range(1, 41):
        params, state = workers(params, state, curvature, target, jnp.asarray(weights(k)))
        np.testing.assert_allclose(flat(params), expected[k], rtol=0, atol=1e-12)
        np.testing.assert_allclose(flat(state.slow), np.stack([shared[k]] * 3), rtol=0, atol=1e-12)
    assert state.skipped.tolist() == [skipped] * 3
    assert skipped == fragments


@pytest.mark.slow
def test_a_worker_that_diverged_does_not_reach_the_others():
    start, *data = problem(3, jnp.float32)
    optimizer = make(2, weighted=True)
    weighted = over_workers(step_of(optimizer), "vmap", 3)
    finite = make(2)
    alone = over_workers(step_of(finite), "vmap", 2)
    broken = jax.tree.map(lambda p: p.at[1].set(jnp.nan), start)
    states = (
        jax.vmap(optimizer.init)(start),
        jax.vmap(finite.init)(jax.tree.map(lambda p: p[::2], start)),
    )
    others = jax.tree.map(lambda x: x[::2], (start, data))
    params, (state, expected_state) = broken, states
    expected = others[0]
    for _ in range(7):
        params, state = weighted(params, state, *data, jnp.array([1.0, 0.0, 1.0]))
        expected, expected_state = alone(expected, expected_state, *others[1])
    kept = jax.tree.map(lambda p: p[::2], params)
    chex.assert_trees_all_close(kept, expected, rtol=1e-6, atol=1e-6)
    # What is NaN remains so after any update; only a replacement mends it.
    mended = jax.vmap(nag_jax.resynchronize)(params, state)
    np.testing.assert_array_equal(mended["d"], state.slow["d"])
    assert np.all(np.isnan(params["d"][1]))


@pytest.mark.parametrize(("fragments", "delay", "mixing"), [(2, 0, 0.0), (3, 2, 0.0), (2, 1, 0.5)])
def test_resynchronize_makes_the_fragment_that_met_exact(fragments, delay, mixing):
    start, *data = problem(2, jnp.float32)
    optimizer = make(fragments, delay, mixing)
    step = over_workers(step_of(optimizer), "vmap", 2)
    params, state = start, jax.vmap(optimizer.init)(start)
    for k in range(1, 22):
        params, state = step(params, state, *data)
        exact = flat(jax.vmap(nag_jax.resynchronize)(params, state))
        applied = nag_jax.meeting(k, every=7, fragments=fragments, delay=delay).applies
        expected = flat(params).copy()
        if applied is not None and mixing == 0:
            part = SLICES[fragments][applied]
            np.testing.assert_allclose(expected[:, part], flat(state.slow)[:, part], atol=1e-6)
            expected[:, part] = flat(state.slow)[:, part]
        np.testing.assert_array_equal(exact, expected)


def test_plain_rounds_are_those_of_one_short_recurrence_bit_for_bit():
    """Outside of jit each operation rounds once, as in NumPy."""
    rows = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    local, c, target = np.broadcast_to(rows[0, :1], (2, 5)), abs(rows[1]), rows[2]
    optimizer = make(every=3)

    def worker(params, state, c, target):
        updates, state = optimizer.update(c * (params - target), state, params)
        return optax.apply_updates(params, updates), state

    step, params = jax.vmap(worker, axis_name=AXIS), jnp.asarray(local)
    state = jax.vmap(optimizer.init)(params)
    f = np.float32
    slow, buffer = local[0].copy(), np.zeros(5, f)
    for k in range(1, 13):
        params, state = step(params, state, c, target)
        update = f(-0.2) * (c * (local - target))
        if k % 3 == 0:
            delta = (slow - (local + update)).sum(axis=0) / f(2)
            buffer = delta + f(0.6) * buffer
            slow = slow + f(-0.7) * (delta + f(0.6) * buffer)
            update = slow - local
        local = local + update
        np.testing.assert_array_equal(params, local)
        np.testing.assert_array_equal(state.slow, np.stack([slow, slow]))
    assert (state.sent, state.feedback, state.skipped, state.met) == ((), (), (), ())


def test_schedules_count_the_outer_steps_of_their_fragment():
    optimizer = nag_jax.outer(
        optax.sgd(1.0), optax.sgd(lambda k: jnp.where(k == 1, 1.0, 0.0)), every=4, fragments=2
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state, seen = optimizer.init(params), []
    for _ in range(12):
        updates, state = optimizer.update({"a": -jnp.ones(2), "b": -jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((float(state.slow["a"][0]), float(state.slow["b"][0])))
    # Steps 2, 6, 10 are those of "a", steps 4, 8, 12 those of "b"; only the second of each moves.
    assert seen == [(0, 0)] * 5 + [(4, 0)] * 2 + [(4, 4)] * 5


@pytest.mark.slow
def test_a_checkpoint_within_a_delayed_round_resumes_bit_for_bit(tmp_path):
    start, *data = problem(2, jnp.float32)
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start)
    options = dict(
        slow_dtype=jnp.float32, weighted=True, memory_kind="pinned_host", send_dtype=jnp.int8
    )
    optimizer = make(3, 4, 0.5, **options)

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, state, sync):
        one = jax.vmap(step_of(optimizer, sync), axis_name=AXIS)
        return one(params, state, *data, jnp.array([1.0, 2.0]))

    def many(carry, steps):
        for k in steps:
            carry = step(*carry, nag_jax.meeting(k, every=7, fragments=3, delay=4))
        return carry

    begin = start, jax.vmap(optimizer.init)(start)
    whole = jax.device_get(many(begin, range(1, 21)))
    half = many(begin, range(1, 10))
    assert np.any(half[1].sent.mean["d"] != 0)  # on its way
    (tmp_path / "state").write_bytes(pickle.dumps(jax.device_get(half)))
    saved = pickle.loads((tmp_path / "state").read_bytes())
    resumed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, half)
    chex.assert_trees_all_equal(jax.device_get(many(resumed, range(10, 21))), whole)
    lost = lambda x: jax.device_put(np.zeros_like(x), x.sharding)
    without = resumed[1]._replace(sent=jax.tree.map(lost, resumed[1].sent))
    other = jax.device_get(many((resumed[0], without), range(10, 21)))
    assert np.max(np.abs(other[1].slow["d"] - whole[1].slow["d"])) > 1e-3


def test_buffers_in_host_memory_change_no_bit_and_leave_the_device():
    start, *data = problem(2, jnp.float32)
    results = []
    for memory_kind in ("pinned_host", None):
        optimizer = make(2, 1, 0.5, memory_kind=memory_kind)

        @functools.partial(jax.jit, static_argnums=2, donate_argnums=(0, 1))
        def step(params, state, sync, optimizer=optimizer):
            return jax.vmap(step_of(optimizer, sync), axis_name=AXIS)(params, state, *data)

        params, state = jax.tree.map(jnp.copy, start), jax.vmap(optimizer.init)(start)
        for k in range(1, 17):
            params, state = step(params, state, nag_jax.meeting(k, every=7, fragments=2, delay=1))
        x = jax.vmap(nag_jax.eval_params)(params, state)
        exact = jax.jit(jax.vmap(nag_jax.resynchronize))(params, state)
        results.append(jax.device_get((params, state, x, exact)))
        for leaf in jax.tree.leaves((state.slow, state.outer, state.sent.mean)):
            assert leaf.sharding.memory_kind == (memory_kind or "device")
        for leaf in jax.tree.leaves((params, state.inner, state.steps)):
            assert leaf.sharding.memory_kind == "device"
    chex.assert_trees_all_equal(*results)


def test_fragments_are_successive_leaves_of_balanced_size():
    def sizes(leaves, fragments):
        params = [jnp.zeros(n) for n in leaves]
        state = nag_jax.outer(optax.sgd(1.0), optax.sgd(1.0, 0.9), every=9, fragments=fragments)
        parts = state.init(params).outer.inner_states.values()
        return [[x.size for x in jax.tree.leaves(part)] for part in parts]

    assert sizes([4, 3, 5, 2], 2) == [[4, 3], [5, 2]]
    assert sizes([4, 3, 5, 2], 4) == [[4], [3], [5], [2]]
    assert sizes([9, 1, 1, 1], 3) == [[9], [1, 1], [1]]
    assert sizes([1] * 8, 4) == [[1, 1]] * 4
    assert sizes([1, 1, 9], 3) == [[1], [1], [9]]


@pytest.mark.slow
@pytest.mark.parametrize("send_dtype", [jnp.bfloat16, jnp.int8, jnp.int4])
def test_send_dtype_sends_rounded_displacements_and_keeps_the_rest(send_dtype):
    """Fragments and a delay, with what communication.mean_of_workers returns, by hand."""
    optimizer = nag_jax.outer(
        optax.sgd(1.0), optax.sgd(1.0), every=2, fragments=2, delay=1, axis_name=AXIS,
        weighted=True, send_dtype=send_dtype,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    start = {name: jnp.zeros((2, 32, 64)) for name in "ab"}
    pull = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), start)
    weight = jnp.array([1.0, 3.0])

    def worker(params, state, gradient, weight):
        updates, state = optimizer.update(gradient, state, params, weight=weight)
        return optax.apply_updates(params, updates), state

    step = jax.jit(jax.vmap(worker, axis_name=AXIS))
    mean = jax.jit(
        jax.vmap(
            lambda tree, state, weight: communication.mean_of_workers(
                tree, state, AXIS, weight, send_dtype
            ),
            axis_name=AXIS,
        )
    )
    params, state = start, jax.vmap(optimizer.init)(start)
    local, slow, on_the_way = start, dict(start), {}
    only = lambda name, x: dict.fromkeys(start) | {name: x}  # the other fragment is None
    kept = {name: jax.vmap(communication.start)(only(name, start[name])) for name in start}
    for k in range(1, 10):
        params, state = step(params, state, pull, weight)
        local = jax.tree.map(jnp.subtract, local, pull)
        for name, first in (("a", 1), ("b", 2)):
            if k >= first and (k - first) % 2 == 0:
                moved = only(name, slow[name] - local[name])
                on_the_way[name], _, kept[name] = mean(moved, kept[name], weight)
            if k > first and (k - 1 - first) % 2 == 0:
                slow[name] = slow[name] - on_the_way[name][name]
                local[name] = slow[name]
        chex.assert_trees_all_close(state.slow, slow, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(params, local, rtol=1e-5, atol=1e-5)
    parts = state.feedback.inner_states
    np.testing.assert_allclose(parts["0"].residual["a"], kept["a"].residual["a"], atol=1e-5)
    assert parts["0"].residual["b"] is None
    assert np.any(parts["1"].residual["b"] != 0)


def test_errors():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    outer = functools.partial(nag_jax.outer, optax.sgd(0.1), optax.sgd(0.7))
    for match, options in {
        r"fragments must be at most every, 2, got 3": dict(every=2, fragments=3),
        r"fragments must be an int of at least 1, got 0": dict(every=2, fragments=0),
        r"delay must be less than every, 4, got 4": dict(every=4, delay=4),
        r"delay must be an int of at least 0, got -1": dict(every=4, delay=-1),
        r"mixing must be in \[0, 1\], got 1.5": dict(every=4, mixing=1.5),
        r'memory_kind must be "pinned_host" or None .*, got \'device\'': dict(
            every=4, memory_kind="device"
        ),
        r"weighted needs axis_name": dict(every=4, weighted=True),
        r"send_dtype needs axis_name": dict(every=4, send_dtype=jnp.int8),
        r"send_dtype must be jnp.bfloat16, .* or None, got 'int16'": dict(
            every=4, axis_name=AXIS, send_dtype="int16"
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            outer(**options)
    with pytest.raises(ValueError, match=r"at most the number of arrays in params, 2, got 3"):
        outer(every=4, fragments=3).init(params)
    plain, parts = outer(every=4), outer(every=4, fragments=2)
    weighted = outer(every=4, axis_name=AXIS, weighted=True)
    for match, optimizer, options in (
        (r"weight must be in \[0, inf\), got -1", weighted, dict(weight=-1.0)),
        (r"weight must be a real scalar, got float32\[3\]", weighted, dict(weight=jnp.ones(3))),
        (r"weight was given to an optimizer without weights", plain, dict(weight=1.0)),
        (r"sync must be False or what nag_jax.meeting returns", parts, dict(sync=True)),
        (r"sync must come from nag_jax.meeting with the same fragments=2 and delay=0", parts,
         dict(sync=nag_jax.Meeting(2, 2))),
        (r"sync must come from nag_jax.meeting", parts, dict(sync=nag_jax.Meeting(1, 0))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            optimizer.update(params, optimizer.init(params), params, **options)
    hosted = outer(every=4, memory_kind="pinned_host")
    with pytest.raises(
        ValueError, match=r"memory_kind='pinned_host' needs a step that is compiled"
    ):
        jax.jit(hosted.update)(params, hosted.init(params), params)
    with pytest.raises(ValueError, match=r"step must be an int of at least 1, got 0"):
        nag_jax.meeting(0, every=4)


def test_a_device_without_host_memory_is_an_error_of_init(monkeypatch):
    optimizer = make(axis_name=None, memory_kind="pinned_host")
    kind = type(jax.devices()[0])
    monkeypatch.setattr(kind, "addressable_memories", lambda device: [device.default_memory()])
    with pytest.raises(
        ValueError, match=r"needs a device that can use it, but .* has \['device'\]"
    ):
        optimizer.init(jnp.ones(3))
