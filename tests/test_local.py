"""outer: DiLoCo, SNOO, Lookahead as published, and not a byte between two outer steps."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
import reference
from flax import nnx
from jax.sharding import PartitionSpec
from workers import AXIS, EVERY_WAY, ROW, ROWS, over_workers, problem, run, sharded, step_of

import nag_jax


@EVERY_WAY
@pytest.mark.usefixtures("x64")
def test_two_workers_are_diloco_as_published(way):
    start, curvature, target = problem(2, dtype=jnp.float64)
    inner = optax.adamw(0.05, 0.9, 0.95, weight_decay=0.1)
    optimizer = nag_jax.diloco(inner, AXIS, 0.7, 0.9, every=4)
    step = over_workers(step_of(optimizer), way, 2)
    trace = run(step, optimizer, 60, start, curvature, target)
    gradients = [
        lambda p, i=i: np.asarray(curvature[i]) * (p - np.asarray(target[i])) for i in (0, 1)
    ]
    expected, shared = reference.diloco(
        gradients, start[0], 60, every=4, learning_rate=0.7, momentum=0.9,
        rate=lambda t: 0.05, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    for k, (params, state) in enumerate(trace, 1):
        np.testing.assert_allclose(params, expected[k], rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.slow[0], shared[k], rtol=0, atol=1e-12)
    early = nag_jax.diloco(inner, AXIS, 0.7, 0.9, every=5)
    other = run(over_workers(step_of(early), way, 2), early, 60, start, curvature, target)
    assert np.max(np.abs(other[-1][0] - expected[-1])) > 1e-3


@pytest.mark.usefixtures("x64")
def test_snoo_around_adamw_is_the_single_worker_diloco_of_algoperf():
    """self_tuning/single_worker_dilocov2 of mlcommons/submissions_algorithms, with its numbers."""
    (start, curvature, target), steps = problem(1, dtype=jnp.float64), 400
    rate = optax.cosine_decay_schedule(0.000955, steps)
    inner = optax.adamw(rate, 0.99, 0.995, eps=1e-8, weight_decay=0.2424)
    optimizer = nag_jax.snoo(inner, 0.3006, 0.7675, every=75)
    step = over_workers(step_of(optimizer), "vmap", 1)
    trace = run(step, optimizer, steps, start, curvature, target)
    expected, slow = reference.diloco(
        [lambda p: np.asarray(curvature[0]) * (p - np.asarray(target[0]))], start[0], steps,
        every=75, learning_rate=0.3006, momentum=0.7675,
        rate=lambda t: 0.000955 * (1 + np.cos(np.pi * t / steps)) / 2,
        betas=(0.99, 0.995), weight_decay=0.2424,
    )  # fmt: skip
    for k, (params, state) in enumerate(trace, 1):
        np.testing.assert_allclose(params[0], expected[k, 0], rtol=0, atol=1e-14)
        np.testing.assert_allclose(state.slow[0], slow[k], rtol=0, atol=1e-14)
    assert np.max(np.abs(expected[74, 0] - expected[75, 0])) > 0.01  # the first outer step


def test_the_first_outer_step_is_after_every_steps():
    (start, curvature, target), inner = problem(1), optax.sgd(0.1, 0.9)
    optimizer = nag_jax.snoo(inner, 0.5, 0.0, every=5)
    alone = run(over_workers(step_of(inner), "vmap", 1), inner, 10, start, curvature, target)
    trace = run(
        over_workers(step_of(optimizer), "vmap", 1), optimizer, 10, start, curvature, target
    )
    for k in range(4):
        np.testing.assert_array_equal(trace[k][0], alone[k][0])
        np.testing.assert_array_equal(trace[k][1].slow, start)
    np.testing.assert_allclose(trace[4][0], (start + alone[4][0]) / 2, rtol=1e-6)
    assert [int(state.steps[0]) for _, state in trace] == [1, 2, 3, 4, 0] * 2


@EVERY_WAY
def test_every_step_with_learning_rate_1_is_data_parallel(way):
    start, curvature, target = problem(8)
    inner = nag_jax.nag(optax.exponential_decay(0.2, 10, 0.7), 0.9)
    same = nag_jax.outer(inner, optax.sgd(1.0), every=1, axis_name=AXIS)
    trace = run(over_workers(step_of(same), way, 8), same, 50, start, curvature, target)

    def parallel(params, state, curvature, target):
        gradient = jax.lax.pmean(curvature * (params - target), AXIS)
        updates, state = inner.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    expected = run(over_workers(parallel, "vmap", 8), inner, 50, start, curvature, target)
    for (params, _), (wanted, _) in zip(trace, expected, strict=True):
        np.testing.assert_allclose(params, wanted, rtol=1e-6, atol=1e-6)
    alone = nag_jax.outer(inner, optax.sgd(1.0), every=1)
    trace = run(over_workers(step_of(alone), way, 8), alone, 50, start, curvature, target)
    assert np.max(np.abs(trace[-1][0] - expected[-1][0])) > 0.1


@pytest.mark.usefixtures("x64")
def test_nag_outside_sgd_at_every_step_is_nag():
    start, curvature, target = problem(1, dtype=jnp.float64)
    lr = lambda k: jnp.where(k < 20, 0.75, 0.5)  # of the outer step; inside it is 0.25
    nested = nag_jax.outer(optax.sgd(0.25), nag_jax.nag(lr, 0.9, convention="sutskever"), every=1)
    plain = nag_jax.nag(lambda k: 0.25 * lr(k), 0.9, convention="sutskever")
    trace, expected = (
        run(over_workers(step_of(tx), "vmap", 1), tx, 50, start, curvature, target)
        for tx in (nested, plain)
    )
    x = jax.vmap(nag_jax.eval_params)
    for (params, state), (wanted, wanted_state) in zip(trace, expected, strict=True):
        np.testing.assert_allclose(params, wanted, rtol=0, atol=1e-13)
        np.testing.assert_allclose(x(params, state), x(wanted, wanted_state), rtol=0, atol=1e-13)
    assert np.max(np.abs(x(*trace[9]) - trace[9][0])) > 0.01


def test_lookahead_is_that_of_optax():
    start, curvature, target = (row[0] for row in problem(1))
    ours = nag_jax.lookahead(optax.adam(0.1), 0.5, every=3)
    theirs = optax.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced(start)
    params, state, their_state = start, ours.init(start), theirs.init(pair)
    step = jax.jit(step_of(ours))
    for _ in range(20):
        updates, their_state = theirs.update(curvature * (pair.fast - target), their_state, pair)
        pair = optax.apply_updates(pair, updates)
        params, state = step(params, state, curvature, target)
        np.testing.assert_allclose(params, pair.fast, rtol=1e-5, atol=1e-6)
        evaluated = nag_jax.eval_params(params, state)
        np.testing.assert_allclose(evaluated, pair.slow, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(params - pair.slow)) > 1e-3  # between two outer steps


def test_muon_inside_is_muloco():
    """Against Muon and PyTorch's Nesterov, each by optax, in a loop by hand."""
    rng = np.random.default_rng(1)
    start = {"w": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), "b": jnp.ones(3)}
    targets = jax.tree.map(lambda p: jnp.stack([jnp.zeros_like(p), jnp.ones_like(p)]), start)
    muon, outside = optax.contrib.muon(0.05), optax.sgd(0.7, 0.9, nesterov=True)
    optimizer = nag_jax.diloco(muon, AXIS, every=3)

    def step(params, state, target):
        gradient = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), start)
    trace = run(over_workers(step, "vmap", 2), optimizer, 9, stacked, targets)
    shared, buffer = start, outside.init(start)
    states, worker = [muon.init(start)] * 2, jax.jit(muon.update)
    for _ in range(3):
        ends = []
        for i in range(2):
            params = shared
            for _ in range(3):
                gradient = jax.tree.map(lambda p, t, i=i: p - t[i], params, targets)
                updates, states[i] = worker(gradient, states[i], params)
                params = optax.apply_updates(params, updates)
            ends.append(params)
        delta = jax.tree.map(lambda s, a, b: s - (a + b) / 2, shared, *ends)
        updates, buffer = outside.update(delta, buffer, shared)
        shared = optax.apply_updates(shared, updates)
    first = jax.tree.map(lambda p: p[0], trace[-1][0])
    chex.assert_trees_all_close(first, shared, rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(first["w"] - start["w"])) > 0.3


@EVERY_WAY
def test_workers_are_the_same_bit_for_bit_after_each_outer_step(way):
    start, curvature, target = problem(8, size=400)
    optimizer = nag_jax.diloco(nag_jax.nag(0.2, 0.9), AXIS, every=6)

    def spread(tree):
        return max(int(np.sum(row != row[:1])) for row in jax.tree.leaves(jax.device_get(tree)))

    for exact in (True, False):
        step = over_workers(step_of(optimizer, exact), way, 8)
        rounded = 0
        for k, (params, state) in enumerate(run(step, optimizer, 36, start, curvature, target), 1):
            assert spread((state.slow, state.outer, state.steps)) == 0
            rounded += spread(params) if k % 6 == 0 else 0
            assert spread(params) > 0 or k % 6 == 0
        assert rounded == 0 or not exact
        assert rounded > 0 or exact  # what resynchronize is for
    alone = nag_jax.snoo(nag_jax.nag(0.2, 0.9), every=6)
    trace = run(over_workers(step_of(alone, True), way, 8), alone, 6, start, curvature, target)
    assert spread(trace[-1][1].slow) > 0


COLLECTIVE = r" (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("


def compiled(step, optimizer, size=64, donate=(0, 1)):
    start, curvature, target = problem(8, size)
    state = jax.vmap(optimizer.init)(start)
    jitted = jax.jit(sharded(step, 8, ROWS, ROWS[:2]), donate_argnums=donate)
    return programs.compiled(jitted.lower(start, state, curvature, target)).as_text()


def test_nothing_is_communicated_between_outer_steps():
    optimizer = nag_jax.diloco(nag_jax.nag(0.1, 0.9), AXIS, every=5)
    parts = programs.computations(compiled(step_of(optimizer), optimizer))
    (meeting,) = [name for name, body in parts.items() if re.search(COLLECTIVE, body)]
    assert meeting != "ENTRY"
    (branch,) = re.findall(r"conditional\(.*branch_computations=\{(.*?)\}", parts["ENTRY"])
    assert branch.replace("%", "").split(", ")[1] == meeting
    ((shape,),) = [re.findall(rf"= (\S+){COLLECTIVE}", parts[meeting])]
    assert shape.startswith("f32[64]")  # params once, in float32, and nothing else
    inner_step = compiled(step_of(optimizer, sync=False), optimizer)
    assert not re.search(COLLECTIVE + "| conditional", inner_step)
    last_step = compiled(step_of(optimizer, sync=True), optimizer)
    assert len(re.findall(COLLECTIVE, programs.computations(last_step)["ENTRY"])) == 1

    def synchronous(params, state, curvature, target):
        gradient = jax.lax.pmean(curvature * (params - target), AXIS)
        updates, state = optimizer.update(gradient, state, params, sync=False)
        return optax.apply_updates(params, updates), state

    assert re.search(COLLECTIVE, programs.computations(compiled(synchronous, optimizer))["ENTRY"])


@EVERY_WAY
def test_sync_says_which_step_it_is(way):
    (start, *data), inner = problem(2), nag_jax.nag(0.1, 0.9)
    counted = nag_jax.diloco(inner, AXIS, every=4)
    *_, (expected, expected_state) = run(
        over_workers(step_of(counted), way, 2), counted, 12, start, *data
    )
    told = nag_jax.diloco(inner, AXIS, every=1000)
    stay, meet = (over_workers(step_of(told, sync=sync), way, 2) for sync in (False, True))
    params, state = start, jax.vmap(told.init)(start)
    for k in range(1, 13):
        params, state = jax.block_until_ready((stay if k % 4 else meet)(params, state, *data))
    chex.assert_trees_all_close((params, state), (expected, expected_state), rtol=1e-6, atol=1e-6)
    traced = jax.jit(lambda p, s, sync: told.update(p, s, p, sync=sync)[1].steps)
    one = nag_jax.outer(inner, optax.sgd(1.0), every=1000)
    traced = jax.jit(lambda sync: one.update(start, one.init(start), start, sync=sync)[1].steps)
    assert (int(traced(False)), int(traced(True))) == (1, 0)


def test_shard_map_proves_that_the_slow_copy_is_replicated():
    """With the shared part of the state unsharded, its check of replication has to pass."""
    start, *data = problem(8)
    optimizer = nag_jax.diloco(nag_jax.nag(0.2, 0.9), AXIS, every=3)
    one = jax.tree.map(lambda p: p[0], start)
    state = optimizer.init(one)._replace(inner=jax.vmap(optimizer.init)(start).inner)
    whole = PartitionSpec()
    specs = ROW, nag_jax.OuterState(inner=ROW, slow=whole, outer=whole, steps=whole), ROW, ROW
    step = jax.jit(sharded(step_of(optimizer), 8, specs, specs[:2]))
    params = start
    for _ in range(7):
        params, state = jax.block_until_ready(step(params, state, *data))
    stacked = run(over_workers(step_of(optimizer), "shard_map", 8), optimizer, 7, start, *data)
    np.testing.assert_allclose(params, stacked[-1][0], rtol=1e-6)
    np.testing.assert_allclose(state.slow, stacked[-1][1].slow[0], rtol=1e-6)
    alone = nag_jax.snoo(nag_jax.nag(0.2, 0.9), every=3)
    with pytest.raises((TypeError, ValueError)):
        jax.jit(sharded(step_of(alone), 8, specs, specs[:2]))(start, state, *data)


def test_scan_donation_and_a_checkpoint_within_a_round():
    start, *data = problem(4, size=300)
    optimizer = nag_jax.diloco(optax.adamw(0.05), AXIS, every=5, slow_dtype=jnp.bfloat16)
    step = jax.vmap(step_of(optimizer), axis_name=AXIS)
    many = jax.jit(
        lambda carry, steps: jax.lax.scan(
            lambda c, _: (step(*c, *data), None), carry, length=steps
        )[0],
        static_argnums=1,
        donate_argnums=0,
    )
    carry = lambda: (jnp.copy(start), jax.vmap(optimizer.init)(start))
    whole = jax.device_get(many(carry(), 24))
    first = carry()
    half = many(first, 12)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    saved = jax.device_get(half)
    assert saved[1].steps.tolist() == [2] * 4
    chex.assert_trees_all_equal(jax.device_get(many(jax.tree.map(jnp.asarray, saved), 12)), whole)
    forgotten = saved[1]._replace(slow=jnp.asarray(saved[0], jnp.bfloat16))
    other = many(jax.tree.map(jnp.asarray, (saved[0], forgotten)), 12)
    assert np.max(np.abs(other[0] - whole[0])) > 1e-3


@pytest.mark.parametrize("name", ["lookahead", "snoo", "adam outside", "fista outside", "diloco"])
def test_steps_outside_of_jit_compile_nothing_anew(name):
    """And nothing else that is called again and again; the numbers are those of jit."""
    sgd, every = optax.sgd(0.3), 3
    optimizer = {
        "lookahead": nag_jax.lookahead(sgd, every=every),
        "snoo": nag_jax.snoo(sgd, every=every),
        "adam outside": nag_jax.outer(sgd, optax.adam(0.1), every=every),
        "fista outside": nag_jax.outer(sgd, nag_jax.fista(0.5), every=every),
        "diloco": nag_jax.diloco(sgd, AXIS, every=every),
    }[name]
    start, *data = problem(2)
    step = jax.vmap(step_of(optimizer), axis_name=AXIS)
    init, read = jax.vmap(optimizer.init), jax.vmap(nag_jax.eval_params)
    if name != "diloco":
        start, *data = (row[0] for row in (start, *data))
        step, init, read = step_of(optimizer), optimizer.init, nag_jax.eval_params
    params, state = start, init(start)
    jitted, (expected, expected_state) = jax.jit(step), (params, state)

    def steps():
        nonlocal params, state
        for _ in range(2 * every):
            params, state = step(params, state, *data)
            read(params, state)
            nag_jax.replicas_in_sync(state)
            if name != "diloco":
                nag_jax.resynchronize(params, state)

    steps()
    assert programs.compilations(steps) == 0
    for _ in range(4 * every):
        expected, expected_state = jitted(expected, expected_state, *data)
    chex.assert_trees_all_close((params, state), (expected, expected_state), rtol=1e-5, atol=1e-6)


def test_the_count_of_inner_steps_stays_at_the_largest_integer():
    optimizer, params = nag_jax.lookahead(optax.sgd(1.0), every=4), jnp.ones(1)
    state = optimizer.init(params)._replace(steps=jnp.asarray(2**31 - 1, jnp.int32))
    for update in (optimizer.update, jax.jit(optimizer.update, static_argnames="sync")):
        _, after = update(params, state, params, sync=False)
        assert after.steps == state.steps


def test_a_float32_slow_copy_keeps_what_bfloat16_params_lose():
    moved = {}
    gradient = jnp.full(3, 1 / 128)  # a step of an ulp or two of 1, of which a tenth is lost
    for slow_dtype in (None, jnp.float32):
        optimizer = nag_jax.outer(optax.sgd(1.0), optax.sgd(0.1), every=2, slow_dtype=slow_dtype)
        params = jnp.ones(3, jnp.bfloat16)
        state = optimizer.init(params)
        step = jax.jit(lambda p, s, tx=optimizer: tx.update(gradient, s, p))
        for _ in range(40):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        assert params.dtype == jnp.bfloat16
        assert state.slow.dtype == (slow_dtype or jnp.bfloat16)
        moved[slow_dtype] = float(1 - params[0])
        resting = state
        for _ in range(2):  # rounding of params is not a displacement
            _, resting = optimizer.update(jnp.zeros(3), resting, params)
        np.testing.assert_array_equal(resting.slow, state.slow)
    assert moved[jnp.float32] == pytest.approx(20 * 2 / 128 / 10, abs=1 / 128)
    assert moved[None] == 0


def test_schedules_outside_count_outer_steps():
    optimizer = nag_jax.lookahead(optax.sgd(1.0), lambda k: jnp.where(k == 0, 1.0, 0.0), every=3)
    params = jnp.zeros(1)
    state = optimizer.init(params)
    for _ in range(9):
        updates, state = optimizer.update(-jnp.ones(1), state, params)
        params = optax.apply_updates(params, updates)
    assert state.slow == 3


def test_extra_arguments_reach_the_inner_optimizer():
    scale = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, s, p=None, *, value, **_: (jax.tree.map(lambda g: -value * g, g), s),
    )
    optimizer = nag_jax.lookahead(scale, every=9)
    params = jnp.ones(2)
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=3.0, unknown=None)
    np.testing.assert_array_equal(updates, -3 * params)
    with pytest.raises(TypeError, match="value"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("outside", ["nag", "adam", "momentum"])
def test_any_outer_optimizer_in_bfloat16(outside):
    """The state's types do not change, whatever the outer optimizer does to its own."""
    made = {"nag": nag_jax.nag(0.5), "adam": optax.adam(0.1), "momentum": optax.sgd(0.5, 0.9)}
    optimizer = nag_jax.outer(nag_jax.nag(0.1), made[outside], every=3)
    params = {"w": jnp.ones((4, 2), jnp.bfloat16), "none": None}
    step = lambda carry, _: (optimizer.update(carry[0], carry[1], params), None)
    (_, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=7)
    assert state.slow["w"].dtype == jnp.bfloat16
    assert np.all(state.slow["w"] < 1)


def test_the_evaluation_iterate_is_that_of_the_outer_optimizer():
    start, curvature, target = (row[0] for row in problem(1))
    optimizer = nag_jax.snoo(nag_jax.nag(0.1, 0.9), 0.7, 0.9, every=2)
    chain = optax.chain(optax.clip_by_global_norm(100.0), optimizer)
    params, state = {"a": start, "b": start}, chain.init({"a": start, "b": start})
    step = jax.jit(step_of(chain))
    for _ in range(5):
        params, state = step(params, state, curvature, target)
    inside = state[1]
    x = nag_jax.eval_params(params, state)
    chex.assert_trees_all_equal(x, nag_jax.eval_params(inside.slow, inside.outer))
    assert np.max(np.abs(x["a"] - inside.slow["a"])) > 1e-3
    model = nnx.Dict(a=nnx.Param(start), b=nnx.Param(start))
    trained = nnx.Optimizer(model, chain, wrt=nnx.Param)
    for _ in range(5):
        trained.update(model, jax.tree.map(lambda p: curvature * (p - target), nnx.state(model)))
    mine = nag_jax.eval_params(nnx.state(model, nnx.Param), trained.opt_state)
    chex.assert_trees_all_close(nnx.to_pure_dict(mine), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"stack of \(2,\) states"):
        nag_jax.eval_params(jnp.ones((2, 3)), jax.vmap(optimizer.init)(jnp.ones((2, 3))))
    masked = optax.masked(optimizer, {"a": True, "b": False})
    before = {"a": start, "b": start + 1}
    after = nag_jax.eval_params({"a": start + 5, "b": start + 7}, masked.init(before))
    chex.assert_trees_all_equal(after, {"a": start, "b": start + 7})


def test_init_of_abstract_params():
    abstract = {"w": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}
    optimizer = nag_jax.diloco(optax.adamw(1e-3), AXIS, slow_dtype=jnp.float32)
    slow = optimizer.init(abstract).slow["w"]
    assert (slow.shape, slow.dtype) == ((4, 3), jnp.float32)
    assert isinstance(slow, jax.ShapeDtypeStruct)  # nothing that could pass for a copy


def test_errors():
    sgd = optax.sgd(0.1)
    make = functools.partial(nag_jax.outer, sgd, nag_jax.nag(0.7))
    for every in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=r"every must be an int of at least 1"):
            make(every=every)
    with pytest.raises(
        ValueError, match=r"slow_dtype must be a floating or complex dtype .* got 'int8'"
    ):
        make(every=2, slow_dtype="int8")
    with pytest.raises(ValueError, match=r"outer_optimizer must be an optax.Gradient.* got 0.7"):
        nag_jax.outer(sgd, 0.7, every=2)
    with pytest.raises(ValueError, match=r"inner must be an optax.GradientTransformation"):
        nag_jax.outer(optax.sgd, nag_jax.nag(0.7), every=2)
    with pytest.raises(ValueError, match=r"for one worker use nag_jax\.snoo"):
        nag_jax.diloco(sgd, None)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        nag_jax.snoo(sgd, momentum=1.0)
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -1"):
        nag_jax.lookahead(sgd, -1.0)
    with pytest.raises(ValueError, match=r"outer needs params"):
        make(every=2).update(jnp.ones(1), make(every=2).init(jnp.ones(1)))
    with pytest.raises(ValueError, match=r"holds no state of nag_jax\.outer"):
        nag_jax.resynchronize(jnp.ones(1), sgd.init(jnp.ones(1)))
