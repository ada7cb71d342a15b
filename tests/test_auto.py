"""nag_auto and averaged: their NumPy references, scale, noise, sharding and checkpoints."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nag_jax
from tests import reference

RNG = np.random.default_rng(0)
NOISE = [RNG.standard_normal((60, 5, 3)), RNG.standard_normal((60, 4)), RNG.standard_normal(60)]
CURVATURE, TARGET = [0.5, 3.0, 20.0], [1.0, -2.0, 3.0]


def gradients(k, y):
    return [
        c * (leaf - target + 0.3 * noise[k])
        for c, target, leaf, noise in zip(CURVATURE, TARGET, y, NOISE, strict=True)
    ]


def start(dtype=None):
    return [jnp.full((5, 3), 0.5, dtype), jnp.zeros(4, dtype), jnp.ones([], dtype)]


def trajectory(optimizer, steps=60, scale=1.0, params=None):
    """Params and evaluated params of each step, and the last state."""
    params = start() if params is None else params

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, rows, evaluated = optimizer.init(params), [params], [params]
    for k in range(steps):
        g = jax.tree.map(lambda g, p: (scale * g).astype(p.dtype), gradients(k, params), params)
        params, state = step(params, state, g)
        rows.append(params)
        evaluated.append(nag_jax.eval_params(params, state))
    return rows, evaluated, state


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
def test_equals_the_reference(x64, momentum):
    rows, averages, _ = trajectory(nag_jax.nag_auto(momentum=momentum))
    expected = reference.nag_auto(gradients, start(), momentum, 60)
    chex.assert_trees_all_close((rows, averages), expected, rtol=1e-10, atol=1e-12)


def test_without_the_average_it_evaluates_the_iterate(x64):
    rows, xs, _ = trajectory(nag_jax.nag_auto(evaluate="iterate"))
    expected, _ = reference.nag_auto(gradients, start(), 0.9, 60)
    chex.assert_trees_all_close(rows, expected, rtol=1e-10, atol=1e-12)
    for k in range(60):  # y' = x' + 0.9 (x' - x)
        ahead = jax.tree.map(lambda a, b: a + 0.9 * (a - b), xs[k + 1], xs[k])
        chex.assert_trees_all_close(rows[k + 1], ahead, rtol=1e-10, atol=1e-12)


def test_a_schedule_is_a_factor_that_may_start_at_zero(x64):
    schedule = lambda step: jnp.minimum(step / 5, 1.0)
    rows, _, state = trajectory(nag_jax.nag_auto(schedule), 6)
    chex.assert_trees_all_equal(rows[1], rows[0])
    assert optax.tree.get(state, "learning_rate") > 0
    assert not np.array_equal(rows[2][0], rows[1][0])


@pytest.mark.parametrize("power", [-40, -20, 20, 40])
def test_multiples_of_the_loss_change_nothing(power):
    expected, _, _ = trajectory(nag_jax.nag_auto())
    rows, _, _ = trajectory(nag_jax.nag_auto(), scale=2.0**power)
    chex.assert_trees_all_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_zero_gradients_move_nothing():
    params, optimizer = start(), nag_jax.nag_auto()
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_gradient_whose_square_overflows_is_left_out():
    """It passes every check for finite numbers, but must not make params and state NaN for good."""
    optimizer = nag_jax.nag_auto(evaluate="iterate")

    @jax.jit
    def step(params, state, scale):
        g = jax.tree.map(lambda p: scale * (p - 3), params)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = start()
    state = optimizer.init(params)
    for k in range(200):
        before = state
        params, state = step(params, state, 1e30 if k in (0, 20) else 1.0)
        if k in (0, 20):
            assert float(optax.tree.get(state, "learning_rate")) == 0
            for name in ("squares", "progress", *(["distance"] if k else [])):
                chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))
    chex.assert_trees_all_close(
        params, jax.tree.map(lambda p: jnp.full_like(p, 3), params), rtol=1e-3
    )

    for _ in range(50):  # the sum of squares stays finite, too
        params, state = step(jax.tree.map(jnp.zeros_like, params), state, 1e18)
    assert optax.tree.get(state, "learning_rate") > 0
    params, _ = step(params, state, jnp.inf)  # and what is not finite is not hidden
    assert not any(np.any(np.isfinite(p)) for p in params)


def test_noise_alone_lets_the_distance_grow_to_a_tenth_of_the_params_at_most():
    """Where gradients are noise DoG's distance grows with each step."""
    noise = jax.random.normal(jax.random.key(0), (2000, 100))
    optimizer = nag_jax.nag_auto()

    def run(gradient, params):
        def step(carry, noise):
            params, state = carry
            updates, state = optimizer.update(gradient(params, noise), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        (end, state), _ = jax.lax.scan(step, carry, noise)
        error = jnp.linalg.norm(nag_jax.eval_params(end, state) - 10) / 10
        return jnp.linalg.norm(end - params), optax.tree.get(state, "distance")[-1], error

    for params, most in (jnp.ones(100), 1 + 1e-6), (jnp.zeros(100), 0.1):
        moved, distance, _ = run(lambda p, noise: noise, params)
        assert moved > 10 * distance  # what DoG would have taken
        assert distance < most
        _, distance, error = run(lambda p, noise: p - 10.0 + noise, params)
        assert distance > 5
        assert error < 0.1


def test_a_leaf_counts_from_its_first_gradient_on():
    """A first gradient of 0, as below a last layer of zeros, must not fix the steps for good."""
    params = [jnp.full(10, 2.0), jnp.zeros(10)]
    optimizer = nag_jax.nag_auto(evaluate="iterate")

    @jax.jit
    def step(params, state):
        g = jax.grad(lambda p: jnp.sum((p[0] * p[1] - 1) ** 2))(params)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    params, state = step(params, state)
    np.testing.assert_allclose(state.distance[0], 0.01)
    params, state = step(params, state)
    np.testing.assert_allclose(state.distance[0], 0.01 * (1 + 2 * 10**0.5), rtol=1e-6)
    for _ in range(300):
        params, state = step(params, state)
    np.testing.assert_allclose(params[0] * params[1], 1, rtol=1e-3)


def test_average_is_that_of_params_also_after_rounding():
    params = start(jnp.bfloat16)
    rows, averages, _ = trajectory(nag_jax.averaged(nag_jax.nag(0.01)), params=params)
    wide = functools.partial(jax.tree.map, lambda p: np.asarray(p, float))
    mean = wide(rows[0])
    for k, row in enumerate(rows[1:]):
        mean = jax.tree.map(lambda a, p, w=9 / (k + 9): a + w * (p - a), mean, wide(row))
    for a, b in zip(jax.tree.leaves(averages[-1]), jax.tree.leaves(mean), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, float), b, rtol=2.0**-8)


def test_average_with_power_zero_is_the_mean(x64):
    rows, averages, _ = trajectory(nag_jax.averaged(optax.adam(0.1), power=0))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *rows[1:])
    chex.assert_trees_all_close(averages[-1], mean, rtol=1e-12)


@pytest.mark.parametrize("jitted", [False, True])
def test_average_of_a_leaf_that_sometimes_has_no_gradient(x64, jitted):
    """The mean of all its params, of those steps too: as with a gradient of 0."""
    optimizer = nag_jax.averaged(optax.sgd(0.1), power=0)
    update = jax.jit(optimizer.update) if jitted else optimizer.update
    params, rows = {"always": jnp.ones(2), "sometimes": jnp.ones(2), "never": jnp.ones(2)}, []
    state = optimizer.init(params)
    for k in range(7):
        gradients = params | {"never": None} | ({"sometimes": None} if k % 3 else {})
        updates, state = update(gradients, state, params)
        assert updates["never"] is None
        params = {key: p if updates[key] is None else p + updates[key] for key, p in params.items()}
        rows.append(params)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *rows)
    chex.assert_trees_all_close(nag_jax.eval_params(params, state), mean, rtol=1e-12)


def test_average_counts_no_further_than_an_int32():
    optimizer = nag_jax.averaged(optax.sgd(0.1))
    state = optimizer.init(jnp.ones(2))
    last = jnp.asarray(2**31 - 1, jnp.int32)
    state = state._replace(offset=jnp.ones(2), steps=last)
    _, state = optimizer.update(jnp.zeros(2), state, jnp.ones(2))
    assert state.steps == 2**31 - 1
    np.testing.assert_allclose(state.offset, 1, rtol=1e-6)


@pytest.mark.slow
def test_sharded_steps_equal_those_of_one_device():
    """Norms are those of whole leaves, under jit and inside shard_map."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    params = {"w": jnp.arange(48.0).reshape(16, 3) / 48, "b": jnp.ones(3)}
    specs = {"w": rows, "b": whole}
    noise = np.random.default_rng(1).standard_normal((30, 16, 3)).astype(np.float32)

    def train(optimizer, params, state, steps=30):
        for k in range(steps):
            g = {"w": params["w"] - 1 + params["w"].dtype.type(0.1) * noise[k], "b": params["b"]}
            params, state = step_of(optimizer)(params, state, g)
        return params, nag_jax.eval_params(params, state)

    def step_of(optimizer):
        @jax.jit
        def step(params, state, g):
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        return step

    optimizer = nag_jax.nag_auto()
    expected = train(optimizer, params, optimizer.init(params))
    placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    actual = train(optimizer, placed, optimizer.init(placed))
    assert actual[0]["w"].addressable_shards[0].data.shape == (2, 3)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5)

    inside = nag_jax.nag_auto(axis_name="data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, rows), out_specs=specs)
    def mapped(params, noise):
        state = inside.init(params)
        for k in range(5):
            g = {"w": params["w"] - 1 + 0.1 * noise[:, k], "b": params["b"]}
            updates, state = inside.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    alone, _ = train(optimizer, params, optimizer.init(params), 5)
    chex.assert_trees_all_close(mapped(params, jnp.swapaxes(noise, 0, 1)), alone, rtol=2e-5)


def test_goes_on_from_a_saved_state():
    optimizer, params = nag_jax.nag_auto(), start()
    step = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for k in range(8):
        if k == 4:  # what a checkpoint keeps: arrays and a structure
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
            saved = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)
        updates, state = step(gradients(k, params), state, params)
        params = optax.apply_updates(params, updates)
    again, memory = jax.tree.map(jnp.asarray, saved)
    for k in range(4, 8):
        updates, memory = step(gradients(k, again), memory, again)
        again = optax.apply_updates(again, updates)
    chex.assert_trees_all_equal((again, memory), (params, state))


@pytest.mark.parametrize("factory", [nag_jax.nag, nag_jax.nag_auto])
def test_hyperparameters_are_read_and_set_without_retracing(factory):
    optimizer = optax.inject_hyperparams(factory)(learning_rate=0.1, momentum=0.9)
    step = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    params = start()
    state = optimizer.init(params)
    first, second = gradients(0, params), gradients(1, params)
    _, state = step(first, state, params)
    inner = state.inner_state
    assert float(state.hyperparams["learning_rate"]) == np.float32(0.1)
    new = {"learning_rate": jnp.float32(0.02), "momentum": jnp.float32(0.5)}
    state = state._replace(hyperparams=state.hyperparams | new)
    actual, state = step(second, state, params)
    assert float(state.hyperparams["momentum"]) == 0.5
    if factory is nag_jax.nag:
        expected = jax.tree.map(lambda a, b: -0.02 * (b + 0.5 * (0.5 * a + b)), first, second)
    else:
        expected, _ = factory(0.02, 0.5).update(second, inner, params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nag_jax.nag_auto(-1.0), "learning_rate must be in"),
        (lambda: nag_jax.nag_auto(evaluate="mean"), "evaluate must be one of"),
        (lambda: nag_jax.nag_auto(momentum=1.0), "momentum must be in"),
        (lambda: nag_jax.averaged(optax.sgd(0.1), power=-1), "power must be in"),
        (lambda: nag_jax.averaged(0.1), "optimizer must be"),
        (lambda: nag_jax.nag_auto().update([], nag_jax.nag_auto().init([])), "needs params"),
        (
            lambda: nag_jax.nag_auto(evaluate="iterate").update(
                [], nag_jax.nag_auto(evaluate="iterate").init([])
            ),
            "needs params",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
