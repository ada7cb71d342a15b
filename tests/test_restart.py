"""Restart conditions: that they fire when their definition says, that it helps, and everywhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nag_jax
from nag_jax import _reductions, restart, rules

CURVATURES = np.logspace(-4, 0, 30)
START = np.random.default_rng(2).standard_normal(30)
CONDITIONS = {
    "gradient": restart.gradient,
    "value": restart.value,
    "speed": restart.speed,
    "every": restart.every(200),
}


def loss(params):
    return jnp.sum(CURVATURES * jnp.abs(params) ** 2) / 2


def optimizer(rule=None, condition=None, **kwargs):
    rule = rules.chambolle_dossal(2.0) if rule is None else rule
    return optax.chain(optax.sgd(1.0), nag_jax.accelerate(rule, restart=condition, **kwargs))


def run(tx, steps, start=START, loss=loss):
    """Losses of the evaluated iterate, query points, and the number of restarts, of each step."""

    def body(carry, _):
        params, state = carry
        value, g = jax.value_and_grad(loss)(params)
        updates, state = tx.update(jax.tree.map(jnp.conj, g), state, params, value=value)
        params = optax.apply_updates(params, updates)
        fired = optax.tree.get(state, "restarts", default=jnp.zeros([], jnp.int32))
        return (params, state), (loss(nag_jax.eval_params(params, state)), params, fired)

    start = jax.tree.map(jnp.asarray, start)
    return jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[1])((start, tx.init(start)))


def steps_to(losses, start_loss, relative=1e-10):
    reached = np.flatnonzero(np.asarray(losses) <= relative * start_loss)
    return int(reached[0]) + 1 if len(reached) else 10**9


def reference(condition, steps):
    """k/(k+3) with restarts, on x and y, one step after the conditions of the papers hold.

    The conditions are those of O'Donoghue & Candes and Su, Boyd & Candes. The step that restarts
    goes from x, not from y, where its gradient is.
    """
    f = lambda p: np.sum(CURVATURES * p**2) / 2
    x = y = START.copy()
    ys, fired, j, since, speed, last, due = [], [], 0, 0, 0.0, np.inf, False
    for _ in range(steps):
        g = CURVATURES * y
        fired.append(due)
        if due:
            x = y = x - g
            j, due = 0, False
            ys.append(y)
            continue
        new = y - g
        if condition == "gradient":
            due = g @ (new - x) > 0
        elif condition == "value":
            due, last = since > 0 and f(y) > last, f(y)
        elif condition == "speed":
            now = np.linalg.norm(new - x)
            due, speed = since >= 10 and now < speed, now
        else:
            due = since + 2 == 200
        y, j = new + j / (j + 3) * (new - x), j + 1
        x = new
        since = 0 if due else since + 1
        ys.append(y)
    return np.stack(ys), np.cumsum(fired)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_are_those_of_the_papers(name):
    _, ys, fired = run(optimizer(condition=CONDITIONS[name]), 900)
    expected, times = reference(name, 900)
    assert times[-1] >= 2
    np.testing.assert_array_equal(fired, times)
    np.testing.assert_allclose(ys, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", [rules.fista(), rules.chambolle_dossal(2.0)])
def test_gradient_restart_is_nearly_the_optimal_constant_momentum(rule):
    """kappa = 1e4 to 1e-10 of f_0: within 1.3 times, knowing nothing of the conditioning."""
    f0 = loss(START)
    restarted, _, fired = run(optimizer(rule, restart.gradient), 1200)
    constant, _, never = run(optimizer(rules.strongly_convex(1e-4)), 1200)
    assert steps_to(restarted, f0) <= 1.3 * steps_to(constant, f0)
    assert 2 <= fired[-1] <= 20
    assert never[-1] == 0
    without, _, _ = run(optimizer(rule), 1200)
    assert steps_to(without, f0) > 1200


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_beats_none(name):
    f0 = loss(START)
    losses, _, fired = run(optimizer(rules.fista(), CONDITIONS[name]), 3000)
    assert steps_to(losses, f0) <= 3000 < steps_to(run(optimizer(), 3000)[0], f0)
    assert fired[-1] >= 2


@pytest.mark.usefixtures("x64")
def test_ogm_restarts_too():
    f0 = loss(START)
    losses, _, fired = run(optimizer(rules.ogm(), restart.gradient), 1200)
    assert steps_to(losses, f0) <= 1200
    assert fired[-1] >= 2


def test_a_restart_forgets_the_momentum_and_nothing_else():
    """The step after the decision goes from the iterate, and from there on it is a new run."""
    tx = optimizer(rules.fista(), restart.every(5))
    _, ys, fired = run(tx, 12)
    assert fired.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    curvatures = jnp.asarray(CURVATURES)
    x = ys[2] - curvatures * ys[2]  # the iterate of the step before; ys[3] is ahead of it
    np.testing.assert_allclose(ys[4], x - curvatures * ys[3], rtol=1e-5, atol=1e-6)
    _, again, _ = run(tx, 7, start=ys[4])
    np.testing.assert_allclose(again, ys[5:], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", [rules.fista(), rules.strongly_convex(0.01), rules.ogm()])
def test_the_iterate_at_a_restart(rule):
    """It is params at the step that restarts, and the buffer then counts as empty."""
    tx = optimizer(rule, restart.every(3))
    params, state = jnp.asarray(START), tx.init(jnp.asarray(START))
    for _ in range(2):
        updates, state = tx.update(CURVATURES * params, state, params)
        params = optax.apply_updates(params, updates)
    x = nag_jax.eval_params(params, state)
    assert np.abs(x - params).max() > 1e-3
    updates, state = tx.update(CURVATURES * params, state, params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after, x - CURVATURES * params, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(nag_jax.eval_params(after, state), after)
    fresh = tx.init(after)
    for _ in range(2):
        updates, state = tx.update(CURVATURES * after, state, after)
        expected, fresh = tx.update(CURVATURES * after, fresh, after)
        np.testing.assert_allclose(updates, expected, rtol=0, atol=1e-15)
        after = optax.apply_updates(after, updates)


@pytest.mark.usefixtures("x64")
def test_a_restart_keeps_the_step_of_a_learning_rate_schedule():
    rate = lambda step: jnp.where(step < 7, 0.5, 1.0)
    kernel = nag_jax.accelerate(rules.estimate_sequence(rate), restart=restart.every(5))
    state = kernel.init(jnp.ones(2))
    for _ in range(5):
        _, state = kernel.update(-jnp.ones(2), state)
    assert state.carry[0] == 5
    assert state.carry[1] == 1.0
    assert state.restart.phase == 2  # the buffer counts as empty
    kernel = nag_jax.accelerate(rules.srsgd(100), restart=restart.every(2))
    state = kernel.init(jnp.ones(2))
    for _ in range(2):
        _, state = kernel.update(-jnp.ones(2), state)
    assert [int(c) for c in state.carry] == [2, 1]


def test_without_a_restart_nothing_is_added():
    """The state's leaves are the buffer, the carry, the readout; no reduction is computed."""
    plain, restarted = (
        nag_jax.accelerate(rules.fista(), restart=r) for r in (None, restart.gradient)
    )
    params = jnp.ones(4)
    assert len(jax.tree.leaves(plain.init(params))) == 3
    assert len(jax.tree.leaves(restarted.init(params))) == 7
    program = lambda tx: str(jax.make_jaxpr(tx.update)(params, tx.init(params)))
    assert "reduce_sum" not in program(plain)
    assert program(restarted).count("reduce_sum") == 1


SPECS = {"sharded": PartitionSpec("data"), "whole": PartitionSpec()}
TREE = {"sharded": START[:16], "whole": START[16:]}


def tree_loss(params):
    curvature = {"sharded": jnp.asarray(CURVATURES[:16]), "whole": jnp.asarray(CURVATURES[16:])}
    return sum(jnp.sum(curvature[k] * params[k] ** 2) / 2 for k in params)


def sharded_run(axis_name, steps, check_vma=True):
    tx = optimizer(rules.fista(), restart.gradient, axis_name=axis_name)
    curvature = {"sharded": jnp.asarray(CURVATURES[:16]), "whole": jnp.asarray(CURVATURES[16:])}

    def local(params, curvature):
        def body(carry, _):
            params, state = carry
            gradients = jax.tree.map(jnp.multiply, curvature, params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=steps)
        return params, optax.tree.get(state, "restarts")[None]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    counts = PartitionSpec() if axis_name and check_vma else PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=(SPECS, counts), check_vma=check_vma
    )
    return jax.jit(mapped)(jax.tree.map(jnp.asarray, TREE), curvature)


@pytest.mark.usefixtures("x64")
def test_shard_map_restarts_as_one_device_does():
    steps = 700
    params, fired = sharded_run("data", steps)
    tx = optimizer(rules.fista(), restart.gradient)
    _, ys, times = run(tx, steps, start=TREE, loss=tree_loss)
    assert times[-1] >= 1
    assert fired.tolist() == [times[-1]]
    for key in TREE:
        np.testing.assert_allclose(params[key], ys[key][-1], rtol=0, atol=1e-12)
    # Unchecked, the whole leaves count once for each device: another inner product, but one for
    # all devices. On its own each device sees its rows only, and they part.
    _, fired = sharded_run(("data",), steps, check_vma=False)
    assert len(set(fired.tolist())) == 1
    _, fired = sharded_run(None, steps, check_vma=False)
    assert len(set(fired.tolist())) > 1


def test_the_inner_product_counts_once_what_all_devices_hold():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    product = lambda tree: _reductions.inner_product(tree, tree, "data")
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(SPECS,), out_specs=PartitionSpec())
    ones = {"sharded": jnp.ones(16), "whole": jnp.ones(14)}
    assert jax.jit(mapped)(ones) == 30
    unchecked = jax.shard_map(
        product, mesh=mesh, in_specs=(SPECS,), out_specs=PartitionSpec(), check_vma=False
    )
    assert jax.jit(unchecked)(ones) == 16 + 8 * 14


def test_a_leaf_in_columns_moves_a_number_only():
    """However a leaf is sharded under jit, its part of the inner product is summed in place."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, "data"))
    x = jax.device_put(jnp.ones((512, 1024)), columns)
    product = jax.jit(lambda tree: _reductions.inner_product(tree, tree, None))
    assert product([x, x]) == 2**20
    text = programs.compiled(product.lower([x, x])).as_text()
    assert all(sum(sizes) <= 2 for sizes in programs.collectives(text).values())


@pytest.mark.usefixtures("x64")
def test_complex_leaves_count_their_real_inner_product():
    """A complex parameter is two real ones."""
    rotated = START[:15] + 1j * START[15:]
    pairs = lambda p: jnp.concatenate([p.real, p.imag])
    curvature = np.logspace(-4, 0, 15)
    complex_loss = lambda p: jnp.sum(curvature * jnp.abs(p) ** 2) / 2
    real_loss = lambda p: jnp.sum(np.tile(curvature, 2) * p**2) / 2
    tx = optimizer(rules.fista(), restart.gradient)
    _, ys, fired = run(tx, 600, start=rotated, loss=complex_loss)
    _, real_ys, real_fired = run(tx, 600, start=START, loss=real_loss)
    assert fired[-1] >= 1
    np.testing.assert_array_equal(fired, real_fired)
    np.testing.assert_allclose(jax.vmap(pairs)(ys), real_ys, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_masked_and_missing_leaves_do_not_count():
    """A frozen leaf with a huge gradient changes nothing, masked or given no gradient at all."""
    tx = optimizer(rules.fista(), restart.gradient)
    mixed = {"free": START, "frozen": 100.0 * np.ones(3), "none": None}
    both = lambda p: loss(p["free"]) + jnp.sum(p["frozen"] ** 2)
    mask = {"free": True, "frozen": False, "none": None}
    frozen = {"free": False, "frozen": True, "none": None}
    masked = optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.masked(tx, mask))
    _, ys, fired = run(masked, 500, start=mixed, loss=both)
    _, alone, times = run(tx, 500)
    assert times[-1] >= 1
    np.testing.assert_array_equal(fired, times)
    np.testing.assert_allclose(ys["free"], alone, rtol=0, atol=1e-13)
    kernel = nag_jax.accelerate(rules.fista(), restart=restart.gradient)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates, state = kernel.update({"a": jnp.ones(2), "b": None}, kernel.init(params))
    assert updates["b"] is None
    assert state.restart.restarts == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:momentum 0.98 in a")
def test_low_precision_leaves_are_summed_in_float32(dtype):
    """10,000 products of 0.01 are 100, which bfloat16 cannot count up to in steps of 0.01."""
    seen = []
    condition = lambda s: (seen.append(s.dot(s.u, s.v)) or False, s.remembered)
    kernel = nag_jax.accelerate(rules.fista(), restart=condition)
    u = jnp.full(10_000, 0.1, dtype)
    kernel.update(u, kernel.init(u))
    assert seen[0].dtype == jnp.float32
    np.testing.assert_allclose(seen[0], 100.0, rtol=1e-2)


@pytest.mark.parametrize("name", ["gradient", "value", "speed"])
def test_a_condition_may_be_named(name):
    by_name, given = (
        run(optimizer(condition=condition), 500) for condition in (name, CONDITIONS[name])
    )
    assert given[2][-1] > 0
    np.testing.assert_array_equal(by_name[1], given[1])


def test_any_function_is_a_condition():
    """Restart when the momentum is a hundred times the step, say."""
    large = lambda s: (s.dot(s.v, s.v) > 1e4 * s.dot(s.u, s.u), s.remembered)
    _, _, fired = run(optimizer(rules.fista(), large), 500)
    assert fired[-1] >= 1


def test_errors():
    with pytest.raises(ValueError, match=r"call it, as in restart.every\(100\)"):
        nag_jax.fista(0.1, restart=nag_jax.restart.every)
    with pytest.raises(ValueError, match=r"restart must be one of .* got 'gradients'"):
        nag_jax.accelerate(rules.fista(), restart="gradients")
    for rule in (rules.heavy_ball(0.9), rules.gpa(), rules.trace(0.9)):
        kernel = nag_jax.accelerate(rule, restart=restart.gradient)
        with pytest.raises(ValueError, match=r"restart needs a rule with .* got direct="):
            kernel.init(jnp.ones(2))
    kernel = nag_jax.accelerate(rules.fista(), restart=restart.value)
    with pytest.raises(ValueError, match=r"restart\.value needs the loss .*value=loss"):
        kernel.update(jnp.ones(2), kernel.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"n must be an int of at least 1, got 0"):
        restart.every(0)


BAD_RESULTS = {
    "two fires": (lambda s: (s.u < 0, s.remembered), "returns first must be .* got bool[2]"),
    "two memories": (lambda s: (False, s.v), "returns second must be .* got float32[2]"),
    "no memory": (lambda s: (False, None), "returns second must be a real scalar, got None"),
    "text": (lambda s: ("yes", 0.0), "returns first must be a real scalar, got 'yes'"),
    "one": (
        lambda s: True,
        "must return a pair (fire, remembered), got True; return seen.remembered",
    ),
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_what_a_condition_must_return(name):
    condition, message = BAD_RESULTS[name]
    kernel = nag_jax.accelerate(rules.fista(), restart=condition)
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        kernel.update(jnp.ones(2), kernel.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("given", "got"), [(jnp.ones(3), r"float32\[3\]"), (1j, r"complex64\[\]"), ("low", "'low'")]
)
def test_the_value_must_be_one_number(given, got):
    chain = optimizer(rules.fista(), restart.value)
    message = f"value must be a real scalar, got {got}; reduce it to one number"
    for tx in (chain, nag_jax.backtracking(), nag_jax.adanag()):
        with pytest.raises(ValueError, match=message):
            tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), value=given, value_fn=jnp.sum)
    tx = nag_jax.backtracking()
    with pytest.raises(ValueError, match=r"what value_fn returns must be .* got float32\[3\]"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), value=1.0, value_fn=jnp.abs)
    _, state = chain.update(jnp.ones(3), chain.init(jnp.ones(3)), value=2)
    assert optax.tree.get(state, "remembered") == 2


def data_parallel(mapping, axis_name, steps=60, condition=restart.value):
    """Copies of params and restarts of 8 devices, each with the loss of a row of its own."""
    tx = optimizer(rules.fista(), condition, axis_name=axis_name)
    curvatures = jnp.asarray(np.random.default_rng(3).uniform(0, 0.2, (8, 6)) ** 2)
    curvatures = curvatures / jnp.max(jnp.mean(curvatures, 0))

    def local(curvature):
        def step(carry, _):
            params, state = carry
            own = jnp.sum(curvature * params**2) / 2
            gradient = jax.lax.pmean(curvature * params, "data")
            updates, state = tx.update(gradient, state, params, value=own)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, optax.tree.get(state, "restarts"))

        start = jnp.ones(6)
        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]

    if mapping == "pmap":
        return jax.pmap(local, axis_name="data")(curvatures)
    stacked = lambda curvature: jax.tree.map(lambda x: x[None], local(curvature[0]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    checked = mapping == "checked"
    copies = PartitionSpec() if checked else PartitionSpec("data")
    return jax.jit(jax.shard_map(
        stacked, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=copies, check_vma=checked,
    ))(curvatures)  # fmt: skip


@pytest.mark.parametrize("mapping", ["pmap", "unchecked", "checked"])
def test_devices_with_losses_of_their_own_restart_together(mapping):
    """By the mean of the losses, so that copies of params stay the same bit for bit."""
    params, fired = data_parallel(mapping, "data")
    for copy, times in zip(params, fired, strict=True):
        np.testing.assert_array_equal(copy, params[0])
        np.testing.assert_array_equal(times, fired[0])
    assert fired[0, -1] >= 1
    mean = lambda s: restart.value(s._replace(value=jax.lax.pmean(s.value, "data")))
    _, expected = data_parallel("unchecked", None, condition=mean)
    np.testing.assert_array_equal(fired[0], expected[0])


def test_without_the_axis_each_device_decides_for_itself():
    params, fired = data_parallel("unchecked", None)
    assert np.ptp(fired[:, -1]) >= 1
    assert np.max(np.ptp(params, axis=0)) > 1e-3
