"""Lean storages reach the limit where nearest rounding does not; bounds, sharding, resuming."""

import functools
import itertools
import math
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nag_jax
from nag_jax import rules
from nag_jax.precision import int8_blocks as _blocks
from nag_jax.precision import rounding as _rounding
from nag_jax.precision import storage as storage_module

INT8 = functools.partial(nag_jax.int8_blocks, min_size=1, shards=8)
STORAGES = {"bfloat16": nag_jax.stochastic_bfloat16, "int8": INT8}
every_storage = pytest.mark.parametrize("make", STORAGES.values(), ids=STORAGES)


def buffer(state):
    """What the kernel computes with, float32, of the one AccelerateState of a tree."""
    return jax.tree.map(
        lambda m: m.astype(jnp.float32), storage_module.read(state.m, state.storage)
    )


def after(kernel, gradient, steps):
    state = jax.tree.map(jnp.array, kernel.init(gradient))
    step = lambda state, _: (kernel.update(gradient, state)[1], None)
    return jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[0])(state)


def keys_of_steps(count, seed=0):
    advance = lambda key, _: (_rounding.next_key(key), key)
    return jax.lax.scan(advance, _rounding.start_key(seed), length=count)[1]


def share_of_limit(storage, momentum, gradient):
    """Mean of m over its limit g/(1 - momentum), after 10 time constants."""
    kernel = nag_jax.accelerate(rules.trace(momentum), accumulator_dtype=storage)
    with warnings.catch_warnings(action="ignore"):
        state = after(kernel, gradient, round(10 / (1 - momentum)))
    return float(jnp.mean(buffer(state) / gradient)) * (1 - momentum)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.9, 0.95, 0.99, 0.995, 0.999])
def test_constant_gradient_reaches_the_limit_only_with_unbiased_rounding(momentum):
    gradient = jnp.linspace(0.02, 1.0, 4096)
    for make in STORAGES.values():
        assert abs(share_of_limit(make(), momentum, gradient) - 1) < 0.01
    nearest = share_of_limit(jnp.bfloat16, momentum, gradient)
    assert nearest < {0.9: 0.985, 0.95: 0.96, 0.99: 0.87, 0.995: 0.75, 0.999: 0.35}[momentum]


@every_storage
@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e-30, 1e30])
def test_tiny_and_huge_gradients_survive(make, scale):
    gradient = scale * jnp.linspace(0.5, 1.0, 1024)
    assert abs(share_of_limit(make(), 0.9, gradient) - 1) < 0.01


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e6])
def test_an_outlier_moves_its_neighbours_by_less_than_the_stated_bound(outlier):
    x = jnp.linspace(-1.0, 1.0, 128).at[17].set(outlier)
    scales = _blocks.rescale(x, jnp.zeros(1))
    keys = keys_of_steps(20_000)
    store = lambda key: _blocks.encode(x, scales, _rounding.uniform_bits(key, 0, x.shape))
    m = np.asarray(jax.jit(jax.vmap(store))(keys), np.float64)
    exact = np.asarray(x, np.float64)
    error = np.sign(m) * m**2 * outlier / 127**2 - exact
    bound = 2 * np.sqrt(outlier * np.abs(exact)) / 127 + outlier / 127**2
    assert np.all(np.abs(error) < bound * (1 + 1e-4))
    assert np.abs(error[:, 17]).max() <= 2e-7 * outlier
    tolerance = 5 * bound / 2 / math.sqrt(len(keys)) + 1e-4 * bound
    assert np.all(np.abs(error.mean(0)) < tolerance)


def test_errors_of_bfloat16_are_bounded_and_unbiased():
    x = jnp.float32([1.0, 1.001, -3.1415, 1e-30, 6e37, 0.0])
    keys = keys_of_steps(20_000)
    bits = jax.vmap(lambda key: _rounding.uniform_bits(key, 0, x.shape))(keys)
    rounded = jax.vmap(_rounding.to_bfloat16, (None, 0))(x, bits)
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    exact = np.asarray(x, np.float64)
    relative = np.asarray(rounded, np.float64) / np.where(exact == 0, 1, exact) - (exact != 0)
    assert np.abs(relative).max() < 2**-7
    assert np.abs(relative.mean(0)).max() < 5 * 2**-8 / math.sqrt(len(keys))
    assert np.all(np.unique(rounded[:, 0]) == 1.0)
    assert len(np.unique(rounded[:, 1])) == 2
    full = jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32)  # a NaN that carries
    special = jnp.stack([full, jnp.float32(jnp.inf), jnp.float32(-jnp.inf)])
    np.testing.assert_array_equal(_rounding.to_bfloat16(special, jnp.uint32([65535] * 3)), special)


def test_noise_is_uniform_and_independent_of_step_leaf_and_neighbour():
    keys = {seed: keys_of_steps(64, seed) for seed in (0, 1)}
    draw = lambda seed, step, leaf: np.asarray(
        _rounding.uniform_bits(keys[seed][step], leaf, (256, 256)), np.float64
    )
    base = draw(0, 0, 0)
    counts = np.histogram(base, 256, (0, 65536))[0]
    assert np.sum((counts - 256) ** 2 / 256) < 255 + 5 * math.sqrt(2 * 255)
    correlation = lambda a, b: abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    others = [draw(0, 1, 0), draw(1, 0, 0), draw(0, 0, 1), draw(1, 1, 0)]
    others += [np.roll(base, 1, 0), np.roll(base, 1, 1), np.roll(base, 128, 0)]
    assert max(correlation(base, other) for other in others) < 5 / 256
    sums = sum(draw(0, step, 0) for step in range(64)).ravel()
    assert np.std(sums) == pytest.approx(65536 * math.sqrt(64 / 12), rel=0.03)


@pytest.mark.parametrize(
    ("shape", "one", "eight"),
    [((5000, 4096), (5000, 1), (5000, 8)), ((50257, 768), (50257, 1), (50257, 8)),
     ((768, 12, 64), (768, 12, 1), (768, 12, 8)), ((784, 10), (1, 10), (8, 10)),
     ((3, 3, 64, 48), (3, 3, 1, 48), (3, 3, 8, 48)), ((8, 12), (8, 1), (8, 4)),
     ((12, 8), (1, 8), (4, 8)), ((2048,), (16,), (16,)), ((1024,), (8,), (8,)),
     ((1000,), (1,), (8,)), ((7,), (1,), (1,))],
)  # fmt: skip
def test_blocks_are_rows_that_no_shard_splits(shape, one, eight):
    assert _blocks.blocks(shape, 64, 1) == one
    assert _blocks.blocks(shape, 64, 8) == eight
    for length, count in zip(shape, eight, strict=True):
        assert all(count % n == 0 for n in (1, 2, 4, 8) if length % n == 0)


def stored(x, storage):
    """What is read again of ``x``, and the scales."""
    m, memory = storage.init(x)
    m, memory = storage.store(x, m, memory)
    return storage_module.read(m, memory), memory.scales


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("shape", [(128, 256), (256, 24), (16, 4, 128), (1024,), (1000,), (8, 12)])
def test_a_stored_buffer_is_within_the_stated_bound(shape, shards):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x *= np.exp(np.arange(shape[-1], dtype=np.float32) / shape[-1])
    actual, scales = stored(jnp.asarray(x), nag_jax.int8_blocks(min_size=1, shards=shards))
    assert scales.shape == _blocks.blocks(shape, 64, shards)
    inside = tuple(k for n, count in zip(shape, scales.shape, strict=True)
                   for k in (count, n // count))  # fmt: skip
    axes = tuple(range(1, 2 * len(shape), 2))
    largest = np.abs(x.reshape(inside)).max(axes, keepdims=True)
    np.testing.assert_array_equal(scales, largest.reshape(scales.shape))
    bound = 2 * np.sqrt(largest * np.abs(x.reshape(inside))) / 127 + largest / 127**2
    error = np.abs((np.asarray(actual) - x).reshape(inside))
    assert np.all(error < bound * (1 + 1e-4))
    assert error.mean() > 0.1 * bound.mean()


def test_errors_stay_small_where_rows_or_columns_differ_in_size():
    x, size = jax.random.normal(jax.random.key(0), (512, 512)), jnp.exp(jnp.linspace(-8.0, 0, 512))
    for values in (x, x * size[:, None], x * size[None, :]):
        error = stored(values, nag_jax.int8_blocks())[0] - values
        assert jnp.linalg.norm(error) < 0.015 * jnp.linalg.norm(values)
        for axis in (0, 1):  # also relative to each row and column, of which the least is 3e-4
            relative = jnp.linalg.norm(error, axis=axis) / jnp.linalg.norm(values, axis=axis)
            assert jnp.max(relative) < (0.015 if values is x else 0.5)


def test_bytes_of_the_state():
    params = {"kernel": jnp.zeros((512, 1024)), "norm": jnp.zeros(1024)}
    count = 512 * 1024 + 1024

    def per_parameter(storage):
        state = nag_jax.nag(0.1, accumulator_dtype=storage).init(params)
        return sum(x.nbytes for x in jax.tree.leaves(state)) / count

    assert per_parameter(None) == pytest.approx(4, rel=1e-4)
    assert per_parameter(nag_jax.stochastic_bfloat16()) == pytest.approx(2, rel=1e-4)
    assert per_parameter(nag_jax.int8_blocks()) < 1.02
    state = nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks()).init(params)
    assert state.m["kernel"].dtype == jnp.int8
    assert state.m["norm"].dtype == jnp.float32


@pytest.mark.slow
@every_storage
@pytest.mark.parametrize("axes", [P("data"), P(None, "data")])
def test_sharded_state_keeps_its_shards_and_its_numbers(make, axes):
    """ZeRO-1: the buffer lies in eighths, params and gradients are whole on each device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64)}
    optimizer = nag_jax.nag(0.1, accumulator_dtype=make())
    specs = optax.tree.map_params(
        optimizer, lambda _, s: s, optimizer.init(params), {"w": axes},
        transform_non_params=lambda _: P(),
    )  # fmt: skip
    shard = lambda spec: NamedSharding(mesh, spec)
    placed = jax.device_put(optimizer.init(params), jax.tree.map(shard, specs))
    whole = jax.device_put(params, shard(P()))

    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    sharded = jax.jit(
        step, out_shardings=(shard(P()), jax.tree.map(shard, specs)), donate_argnums=(0, 1)
    )
    text = programs.compiled(sharded.lower(whole, placed)).as_text()
    assert "all-reduce" not in text  # the largest of a block is found on its own device
    single, state = jax.jit(step), optimizer.init(params)
    for _ in range(5):
        params, state = single(params, state)
        whole, placed = sharded(whole, placed)
    shards = [x.addressable_shards[0].data.size / x.size
              for x in jax.tree.leaves(placed) if x.ndim == 2]  # fmt: skip
    assert shards == [1 / 8] * (2 if make is INT8 else 1)
    chex.assert_trees_all_close(whole, params, rtol=1e-5)
    assert np.mean(np.asarray(placed.m["w"]) == np.asarray(state.m["w"])) > 0.999
    eager = nag_jax.nag(0.1, accumulator_dtype=make()).init(jax.device_put(params, shard(axes)))
    for x in jax.tree.leaves(eager):
        assert x.ndim < 2 or x.sharding.is_equivalent_to(shard(axes), 2)


def donated_step(make, leaves):
    params = [jnp.ones((64, 128)) for _ in range(leaves)]
    optimizer = nag_jax.nag(0.1, 0.9, accumulator_dtype=make())

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params)
    return programs.compiled(lowered)


@every_storage
def test_leaves_of_one_shape_are_one_loop(make):
    """Nothing in it tells them apart, so that XLA compiles it once for thousands of them."""
    few, many = (donated_step(make, leaves).as_text() for leaves in (3, 6))
    scalars = lambda text: set(re.findall(r" = (\w+\[1?\]\S* constant\(.*?\))", text))
    assert scalars(few) == scalars(many)
    assert "u32[" in str(scalars(few))


def test_the_stored_buffer_is_read_and_not_made_again():
    """Else the update would need the old buffer after it was overwritten: a copy of it."""
    if jax.__version_info__ < (0, 8):
        pytest.skip("the XLA of jax 0.7 makes bfloat16 again")
    program = donated_step(nag_jax.stochastic_bfloat16, 2)
    assert not re.findall(r"bf16\[64,128\]\S* copy\(", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 2 * 64 * 128 / 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_zero1_splits_blocks_too(kind):
    """A leaf of 9 rows is split along its columns, so that devices agree on the scales of rows."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"w": jnp.linspace(-1.0, 1.0, 9 * 256).reshape(9, 256)}
    whole = nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks(min_size=1))
    sharded = nag_jax.zero1(whole, mesh)

    def run(optimizer, params):
        state = optimizer.init(params)
        step = jax.jit(lambda p, s: optimizer.update(jax.tree.map(jnp.sin, p), s, p))
        for _ in range(3):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, state = run(whole, params)
    with jax.set_mesh(mesh):
        actual, split = run(sharded, jax.device_put(params, NamedSharding(mesh, P())))
    assert split.inner.m["w"].addressable_shards[0].data.shape == (9, 32)
    assert split.inner.storage.scales["w"].shape == (9, 1)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert np.mean(np.asarray(split.inner.m["w"]) == np.asarray(state.m["w"])) > 0.999


@every_storage
def test_shards_inside_shard_map_hold_their_own_blocks(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    optimizer = nag_jax.nag(0.1, accumulator_dtype=make())
    g = jnp.linspace(-1.0, 1.0, 64 * 16).reshape(64, 16)
    state = optimizer.init(g)
    specs = jax.tree.map(lambda x: P("data") if x.ndim == 2 else P(), state)
    run = jax.shard_map(
        optimizer.update, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P("data"), specs)
    )
    updates, new = jax.jit(run)(g, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    np.testing.assert_allclose(updates, -0.19 * g, atol=0.09 * 2**-6)


@every_storage
def test_resumed_runs_are_bit_identical(make, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer, params = nag_jax.nag(0.1, 0.99, accumulator_dtype=make(7)), {"w": jnp.ones((64, 64))}
    step = jax.jit(lambda p, s: optimizer.update(jax.tree.map(lambda p: jnp.sin(5 * p), p), s, p))

    def advance(params, state, n):
        for _ in range(n):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        return params, state

    middle = advance(params, optimizer.init(params), 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "5", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "5", jax.tree.map(jnp.zeros_like, middle))
    chex.assert_trees_all_equal(advance(*restored, 5), advance(*middle, 5))
    other = nag_jax.nag(0.1, 0.99, accumulator_dtype=make(8))
    _, reseeded = other.update(jax.tree.map(jnp.sin, params), other.init(params), params)
    _, state = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    assert not np.array_equal(reseeded.storage.key, state.storage.key)


@every_storage
def test_evaluated_iterate_is_exact_and_found_in_wrappers(make):
    """x' = y + u whatever the rounding, since the update is made from what was stored."""
    params = {"a": jnp.linspace(-1.0, 1.0, 640).reshape(10, 64), "b": jnp.ones(3)}
    u = jax.tree.map(lambda p: 0.1 * jnp.sin(9 * p), params)
    kernel = nag_jax.accelerate(rules.nesterov(0.9), accumulator_dtype=make())
    for optimizer in (kernel, optax.masked(kernel, {"a": True, "b": False})):
        update = jax.jit(optimizer.update)
        updates, state = update(u, optimizer.init(params))
        x = nag_jax.eval_params(optax.apply_updates(params, updates), state)
        expected = optax.apply_updates(params, u)
        chex.assert_trees_all_close(x, expected, rtol=1e-6, atol=1e-6)
    exact = 0.9 * u["a"]
    assert not np.array_equal(buffer(update(u, optimizer.init(params))[1].inner_state)["a"], exact)


@every_storage
def test_flax_optimizer_and_vmapped_states(make):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nag_jax.nag(0.1, accumulator_dtype=make()), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    x = nag_jax.eval_params(nnx.state(model, nnx.Param), optimizer.opt_state)
    chex.assert_trees_all_close(x, jax.tree.map(lambda p: p - 0.1, before), rtol=1e-5, atol=1e-6)


@every_storage
def test_nag_auto_computes_with_the_numbers_that_were_stored(make):
    def distances(storage):
        optimizer = nag_jax.nag_auto(evaluate="iterate", accumulator_dtype=storage)

        def step(carry, _):
            updates, state = optimizer.update(carry[0] - 3, carry[1], carry[0])
            return (carry[0] + updates, state), state.distance

        params = jnp.linspace(1.0, 2.0, 64)
        return jax.lax.scan(step, (params, optimizer.init(params)), length=40)[1]

    np.testing.assert_allclose(distances(make()), distances(None), rtol=0.02)


@every_storage
def test_restart_empties_the_buffer(make):
    kernel = nag_jax.accelerate(
        rules.nesterov(0.9), restart=nag_jax.restart.gradient, accumulator_dtype=make()
    )
    u, update = jnp.linspace(0.5, 1.0, 256), jax.jit(kernel.update)
    _, state = update(u, kernel.init(u))
    assert np.all(buffer(state) > 0)
    _, state = update(-0.01 * u, state)
    ahead = buffer(state)
    updates, state = update(-0.01 * u, state)
    assert optax.tree.get(state, "restarts") == 1
    taken_back = np.asarray(updates) + 0.01 * u
    np.testing.assert_allclose(taken_back, -ahead, rtol=0, atol=np.max(ahead) / 64)
    np.testing.assert_allclose(np.mean(taken_back), -np.mean(ahead), rtol=2e-3)
    # Now the buffer counts as empty.
    _, state = update(u, state)
    np.testing.assert_allclose(buffer(state), 0.9 * u, rtol=2**-6)


@every_storage
def test_complex_none_and_wide_leaves(make):
    params = {"c": jnp.ones(8, jnp.complex64), "none": None, "h": jnp.ones(64, jnp.bfloat16)}
    optimizer = nag_jax.nag(0.1, accumulator_dtype=make())
    gradients = {"c": (1 + 2j) * params["c"], "none": None, "h": params["h"]}
    state = optimizer.init(params)
    assert state.m["c"].dtype == jnp.complex64
    updates, state = optimizer.update(gradients, state, params)
    np.testing.assert_allclose(updates["c"], -0.19 * gradients["c"], rtol=1e-6)
    frozen = gradients | {"h": None}
    updates, new = optimizer.update(frozen, state, params)
    assert updates["h"] is None
    np.testing.assert_array_equal(new.m["h"], state.m["h"])


@pytest.mark.parametrize("min_size", [0, 1])
def test_empty_leaves_have_no_blocks(min_size):
    storage = nag_jax.int8_blocks(min_size=min_size)
    optimizer = nag_jax.nag(0.1, accumulator_dtype=storage)
    params = {"empty": jnp.zeros((0, 5)), "flat": jnp.zeros(0), "full": jnp.ones((4, 8))}
    _, state = optimizer.update(params, optimizer.init(params), params)
    m = state.m
    assert {name: m[name].shape for name in m} == {name: params[name].shape for name in m}
    assert m["empty"].dtype == m["flat"].dtype == jnp.float32
    assert m["full"].dtype == jnp.int8


@pytest.mark.usefixtures("x64")
@every_storage
def test_float64_parameters(make):
    params = jnp.linspace(0.5, 1.0, 64, dtype=jnp.float64)
    optimizer = nag_jax.nag(0.1, accumulator_dtype=make())
    state = optimizer.init(params)
    updates, new = optimizer.update(params, state, params)
    assert updates.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_a_storage_that_was_not_called_is_refused():
    with pytest.raises(ValueError, match=r"call it, as in int8_blocks\(\)"):
        nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks)


def test_values_that_are_not_finite_are_seen():
    for bad, make in itertools.product((jnp.nan, jnp.inf), STORAGES.values()):
        optimizer = nag_jax.nag(0.1, accumulator_dtype=make())
        g = jnp.ones(256).at[3].set(bad)
        updates, state = optimizer.update(g, optimizer.init(g))
        assert not np.isfinite(updates[3])
        assert not np.all(np.isfinite(buffer(state)))
        assert np.all(np.isfinite(updates[128:]))
        # With one block for each row, of which the maximum on CPU may ignore a NaN.
        g = jnp.ones((64, 128)).at[3, 4].set(bad)
        updates, state = optimizer.update(g, optimizer.init(g))
        assert not np.isfinite(updates[3, 4])
        assert not np.all(np.isfinite(buffer(state)[3]))
        assert np.all(np.isfinite(updates[4:]))


def test_bfloat16_parameters_move_by_the_whole_update_in_the_mean():
    def trained(tail):
        optimizer = optax.chain(optax.sgd(1e-4), tail)

        def step(carry, _):
            updates, state = optimizer.update(jnp.ones(16384), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        carry = jnp.ones(16384, jnp.bfloat16), optimizer.init(jnp.ones(16384, jnp.bfloat16))
        params, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=2000)[0])(carry)
        assert params.dtype == jnp.bfloat16
        return float(jnp.mean(params.astype(jnp.float32)))

    assert trained(optax.identity()) == 1.0
    assert trained(nag_jax.stochastic_rounding(3)) == pytest.approx(0.8, abs=0.002)


def test_rounded_parameters_are_what_apply_updates_lands_on():
    params = {"h": jnp.linspace(-2.0, 2.0, 999).astype(jnp.bfloat16), "f": jnp.ones(3), "n": None}
    u = {"h": jnp.linspace(1.0, -0.3, 999) * 0.01, "f": jnp.full(3, 1e-3), "n": None}
    tail = nag_jax.stochastic_rounding()
    updates, state = jax.jit(tail.update)(u, tail.init(params), params)
    new = optax.apply_updates(params, updates)
    target = params["h"].astype(jnp.float32) + u["h"]
    wide = params["h"].astype(jnp.float32) + updates["h"]
    np.testing.assert_array_equal(new["h"].astype(jnp.float32), wide)
    assert np.all(np.abs(wide - target) <= np.maximum(np.abs(target), np.abs(wide)) * 2**-7)
    assert np.array_equal(updates["f"], u["f"])
    again, _ = tail.update(u, state, params)
    assert not np.array_equal(again["h"], updates["h"])


def test_updates_may_be_python_numbers():
    tail, params = nag_jax.stochastic_rounding(), jnp.ones([], jnp.bfloat16)
    first, second = (tail.update(u, tail.init(params), params)[0] for u in (0.01, jnp.array(0.01)))
    assert first == second != 0
    for make in STORAGES.values():
        kernel = nag_jax.accelerate(rules.nesterov(0.9), accumulator_dtype=make())
        results = [kernel.update(u, kernel.init(jnp.ones([]))) for u in (0.3, jnp.array(0.3))]
        chex.assert_trees_all_equal(*results)


def test_errors():
    for make in (*STORAGES.values(), nag_jax.stochastic_rounding):
        with pytest.raises(ValueError, match=r"seed must be an integer, got 0\.5"):
            make(0.5)
        with pytest.raises(ValueError, match=r"jax\.random\.bits"):
            make(jax.random.key(0))
        with pytest.raises(ValueError, match=r"seed must be in \[0, 4\.29497e\+09\), got -1"):
            make(-1)
        for fraction in (np.float64(1.5), jnp.float32(0.5)):
            with pytest.raises(ValueError, match=r"seed must be an integer, got .*\.5"):
                make(fraction)
        with pytest.raises(ValueError, match=r"seed must be an integer, got"):
            jax.jit(lambda seed, make=make: make(seed) and 0)(0.5)
        make(np.uint32(7)), make(jnp.int32(7))
    for name, least in (("block_size", 1), ("min_size", 0), ("shards", 1)):
        message = rf'{name} must be an int of at least {least}, got .*static_args=\("{name}",\)'
        for wrong in (least - 1, 2.5, True):
            with pytest.raises(ValueError, match=message):
                nag_jax.int8_blocks(**{name: wrong})
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda n, name=name: nag_jax.int8_blocks(**{name: n}) and 0)(5)
    with pytest.raises(ValueError, match=r"a storage such as nag_jax\.stochastic_bfloat16"):
        nag_jax.nag(0.1, accumulator_dtype=jnp.int8)
    tail = nag_jax.stochastic_rounding()
    with pytest.raises(ValueError, match="needs bfloat16 or at least 32 bits"):
        tail.init({"a": jnp.ones(2, jnp.float16)})
    with pytest.raises(ValueError, match="needs params"):
        tail.update(jnp.ones(2), tail.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("rule", "warns"),
    [(rules.fista(), True), (rules.nesterov(nag_jax.schedules.convex()), True),
     (rules.trace(nag_jax.schedules.sutskever(0.99)), True),
     (rules.nesterov(nag_jax.schedules.sutskever(0.97)), False), (rules.nesterov(0.97), False)],
)  # fmt: skip
@pytest.mark.parametrize("jitted", [False, True])
def test_momentum_that_tends_to_one_warns_in_bfloat16(rule, warns, jitted):
    narrow = jnp.ones(3, jnp.bfloat16)

    def init(storage):
        kernel = nag_jax.accelerate(rule, accumulator_dtype=storage)
        return (jax.jit(kernel.init) if jitted else kernel.init)(narrow)

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        init(None)
    assert [("stochastic_bfloat16" in str(w.message)) for w in record] == [True] * warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init(jnp.float32), init(nag_jax.stochastic_bfloat16())
