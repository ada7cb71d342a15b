"""Settings under which no optimizer may fail or change: strict promotion, x64, NumPy, NaN, mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import CASES, example_params, known, types

import nag_jax
from nag_jax import proximal, restart, rules, schedules

RAMP = optax.linear_schedule(0.0, 0.1, 5)
RULES = {
    "nesterov linear": lambda: rules.nesterov(
        schedules.linear(0.9, warmup_steps=2, cooldown_steps=2, total_steps=9)
    ),
    "nesterov sutskever": lambda: rules.nesterov(
        schedules.sutskever(0.9, total_steps=9, final_steps=2, final_momentum=0.5)
    ),
    "nesterov constant": lambda: rules.nesterov(schedules.strongly_convex(0.1)),
    "trace": lambda: rules.trace(schedules.convex(), RAMP),
    "fista": rules.fista,
    "chambolle_dossal": rules.chambolle_dossal,
    "strongly_convex": lambda: rules.strongly_convex(0.1),
    "estimate_sequence": lambda: rules.estimate_sequence(RAMP, RAMP),
    "ogm": rules.ogm,
    "ogm with a horizon": lambda: rules.ogm(3),
    "ogm_g": lambda: rules.ogm_g(3),
    "tmm": lambda: rules.tmm(0.1),
    "item": lambda: rules.item(0.1),
    "sc_ogm": lambda: rules.sc_ogm(0.1),
    "lessard": lambda: rules.lessard(1.0, 0.5, 0.4),
    "robust_momentum": lambda: rules.robust_momentum(0.1),
    "heavy_ball": lambda: rules.heavy_ball(schedules.convex()),
    "qhm": lambda: rules.qhm(schedules.convex(), schedules.convex()),
    "gpa": rules.gpa,
    "agnes": lambda: rules.agnes(schedules.convex(), RAMP),
    "ema_nesterov": lambda: rules.ema_nesterov(0.9, RAMP),
    "mass": rules.mass,
    "accsgd": rules.accsgd,
    "srsgd": lambda: rules.srsgd(lambda k: 3 + k),
}
RESTARTS = {"value": "value", "speed": "speed", "every": restart.every(2)}


def objective(params):
    (kernel, _), scale = params["layers"], params["scale"]
    return jnp.sum((jnp.abs(kernel) - 0.3) ** 2) + jnp.abs(scale + 1.0) ** 2


def accelerated(rule, **kwargs):
    return optax.chain(optax.sgd(0.1), nag_jax.accelerate(rule(), **kwargs))


EVERY = {name: case.make for name, case in CASES.items()}
EVERY |= {f"rule {name}": lambda rule=rule: accelerated(rule) for name, rule in RULES.items()}
EVERY |= {
    f"fista restarted by {name}": lambda condition=condition: nag_jax.fista(0.1, restart=condition)
    for name, condition in RESTARTS.items()
}
EVERY |= {
    "ogm": lambda: nag_jax.ogm(0.1, restart="value"),
    "tmm": lambda: nag_jax.tmm(0.1, 0.1),
    "estimate_sequence restarted": lambda: accelerated(
        lambda: rules.estimate_sequence(0.1), restart=restart.gradient
    ),
    "srsgd restarted": lambda: accelerated(rules.srsgd, restart=restart.value),
    "lookahead": lambda: nag_jax.lookahead(optax.sgd(0.1), every=2),
    "outer fista": lambda: nag_jax.outer(optax.sgd(0.1), nag_jax.fista(0.5), every=1),
    "prox_step": lambda: optax.chain(
        proximal.prox_step(proximal.l1(0.01), RAMP), nag_jax.accelerate(rules.fista())
    ),
    "group_l1": lambda: nag_jax.fista(0.1, proximal.group_l1(0.01, axis=None)),
    "monotone_fista": lambda: optax.chain(optax.sgd(0.1), nag_jax.monotone_fista(objective)),
    "backtracking by value": lambda: nag_jax.backtracking(restart="value"),
    "adanag from a rate": lambda: nag_jax.adanag(initial=0.1),
    "nag_auto bfloat16": lambda: nag_jax.nag_auto(accumulator_dtype=jnp.bfloat16),
    "nag_auto int8": lambda: nag_jax.nag_auto(accumulator_dtype=nag_jax.int8_blocks(min_size=1)),
    "backtracking inside averaged": lambda: nag_jax.averaged(nag_jax.backtracking()),
}
every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
CONSTANT = (
    "strongly_convex",
    "tmm",
    "sc_ogm",
    "lessard",
    "robust_momentum",
    "gpa",
    "mass",
    "accsgd",
)
STATEFUL = {
    name: make for name, make in EVERY.items() if name.removeprefix("rule ") not in CONSTANT
}
every_state = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
# A schedule of weight decay is float32 in optax.add_decayed_weights, and norms of 0 are divided by
# in optax.clip_by_global_norm.
SCHEDULED_DECAY, CLIPPED = EVERY["nag decoupled"], EVERY["clipped"]
pytestmark = pytest.mark.filterwarnings("ignore:momentum")


def step_of(optimizer, gradient=None):
    gradient = gradient or jax.grad(objective)

    def step(params, state):
        value = known(params, objective)
        updates, state = optimizer.update(gradient(params), state, params, **value)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
def test_strict_promotion(make, dtype, request):
    if make is SCHEDULED_DECAY:
        pytest.skip("optax.add_decayed_weights raises by itself")
    if make is EVERY["stochastic_rounding"] and dtype == "bfloat16":
        pytest.skip("its updates are float32, which optax.apply_updates cannot add to bfloat16")
    if dtype == "float64":
        request.getfixturevalue("x64")

    def run(params):
        optimizer = make()
        params, state = step_of(optimizer)(params, optimizer.init(params))
        return nag_jax.eval_params(params, state)

    params = example_params(dtype)
    with jax.numpy_dtype_promotion("strict"):
        evaluated = jax.eval_shape(run, params)
    assert types(evaluated) == types(params)


INJECTED = {
    nag_jax.nag: dict(learning_rate=0.1, momentum=0.9),
    nag_jax.tmm: dict(learning_rate=0.1, q=0.1),
    nag_jax.backtracking: dict(grow=1.1, shrink=0.5),
    lambda lr, mu: nag_jax.nag_then_sgd(lr, mu, switch_step=3): dict(lr=0.1, mu=0.5),
    lambda a: nag_jax.nag(0.1, schedules.convex(a)): dict(a=3.0),
    lambda top: nag_jax.nag(0.1, schedules.sutskever(top)): dict(top=0.9),
    lambda q: accelerated(lambda: rules.item(q)): dict(q=0.1),
    lambda mu, nu: accelerated(lambda: rules.gpa(mu, nu)): dict(mu=0.9, nu=0.5),
    lambda a: accelerated(lambda: rules.chambolle_dossal(a)): dict(a=3.0),
    lambda q, r: accelerated(lambda: rules.robust_momentum(q, r)): dict(q=0.1, r=0.5),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
@pytest.mark.parametrize(("factory", "hyperparams"), INJECTED.items())
def test_injected_hyperparameters_under_strict_promotion(factory, hyperparams, dtype):
    """They have the dtype of params."""
    injected = ("prox", "restart", "initial", "axis_name", "grow_at_first")
    static = injected if factory is nag_jax.backtracking else ()

    def run(params):
        optimizer = optax.inject_hyperparams(factory, static_args=static)(**hyperparams)
        return nag_jax.eval_params(*step_of(optimizer)(params, optimizer.init(params)))

    params = example_params(dtype)
    with jax.numpy_dtype_promotion("strict"):
        assert types(jax.eval_shape(run, params)) == types(params)


@pytest.mark.parametrize("step", [0, 7, np.int64(7), jnp.int32(7), jnp.uint32(7)])
def test_schedules_under_strict_promotion(step):
    expected = {
        schedules.sutskever(0.99, period=2): min(1 - 0.5 / (int(step) // 2 + 1), 0.99),
        schedules.convex(): max(int(step) - 1, 0) / (max(int(step) - 1, 0) + 3),
        schedules.strongly_convex(0.25): 1 / 3,
        schedules.linear(0.9, warmup_steps=10): 0.5 + 0.04 * int(step),
    }
    with jax.numpy_dtype_promotion("strict"):
        for schedule, value in expected.items():
            np.testing.assert_allclose(schedule(step), value, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_training_and_solving_under_strict_promotion(dtype, x64):
    one = jnp.ones([], dtype)
    loss = lambda p, batch: jnp.mean(jnp.abs(batch.astype(dtype) @ p - one) ** 2)
    params, batch = jnp.zeros(2, dtype), jnp.ones((9, 2))  # a row is left over by 8 devices
    with jax.numpy_dtype_promotion("strict"):
        for mode in ("jit", "shard_map"):
            step = nag_jax.train_step(loss, nag_jax.nag(0.1), mode=mode)
            trained, _, metrics = step(params, step.init(params), batch)
            assert trained.dtype == dtype
            assert metrics["loss"] == 1.0
        fun = lambda p: jnp.sum(jnp.abs(p - one) ** 2)
        prox = proximal.l1(0.1)
        for optimizer in (None, nag_jax.fista(0.25, prox)):
            result = nag_jax.minimize(fun, params, optimizer, prox=prox, tol=1e-2)
            assert result.params.dtype == dtype
            np.testing.assert_allclose(np.complex64(result.params), 0.95, atol=1e-2)
        if dtype != "complex64":
            assert nag_jax.largest_curvature(fun, params) == pytest.approx(2.04, rel=1e-2)


@every_state
def test_a_state_keeps_its_dtypes_when_x64_is_enabled_later(make, request):
    """Under strict promotion as well, so that nothing is mixed on the way."""
    optimizer, params = make(), example_params()
    state, gradient = jax.eval_shape(optimizer.init, params), jax.grad(objective)(params)
    request.getfixturevalue("x64")
    step = step_of(optimizer, lambda _: gradient)
    promotion = "standard" if make is SCHEDULED_DECAY else "strict"
    with jax.numpy_dtype_promotion(promotion):
        new_params, new_state = jax.eval_shape(step, params, state)
        repeat = lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, length=2)[0]
        jax.eval_shape(repeat, (params, state))
    assert types(new_params) == types(params)
    assert types(new_state) == types(state)


def test_a_rule_may_return_any_float_dtype(x64):
    """The kernel casts what it carries, so that a rule need not know how its state was made."""

    def step(carry):
        carry = jax.tree.map(lambda x: x.astype(float) / 2, carry)
        return carry, rules.Coefficients(beta=carry["a"], kappa=carry["a"])

    narrow = {"a": jnp.float32(0.5)}
    for condition in (None, restart.gradient):
        kernel = nag_jax.accelerate(rules.Rule(lambda: narrow, step), condition)
        state = kernel.init(jnp.ones(2, jnp.float32))
        updates, new = kernel.update(jnp.ones(2, jnp.float32), state)
        assert types(new) == types(state)
        np.testing.assert_array_equal(updates, 1.25)


@pytest.mark.slow
@every_state
def test_a_restored_state_of_numpy_scalars_gives_the_same_numbers(make):
    optimizer, params = make(), example_params()
    step = step_of(optimizer)
    params, state = step(params, optimizer.init(params))
    restored = jax.tree.map(lambda x: np.asarray(x)[()], state)
    expected, actual = step(params, state), step(params, restored)
    assert types(actual) == types(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    evaluated = nag_jax.eval_params(params, state)
    jax.tree.map(np.testing.assert_array_equal, nag_jax.eval_params(params, restored), evaluated)


@every_state
def test_nothing_is_nan_on_the_way(make):
    """Where gradient, params and value are 0, eagerly: jax_debug_nans looks at each operation."""
    if make is CLIPPED:
        pytest.skip("optax.clip_by_global_norm divides 0 by 0")
    optimizer, zeros = make(), jax.tree.map(jnp.zeros_like, example_params())
    flat = lambda params: 0 * objective(params)
    with jax.debug_nans(True):
        params, state = zeros, optimizer.init(zeros)
        for _ in range(2):
            updates, state = optimizer.update(zeros, state, params, **known(params, flat))
            params = optax.apply_updates(params, updates)
        nag_jax.eval_params(params, state)
    jax.tree.map(np.testing.assert_array_equal, params, zeros)


@pytest.mark.parametrize(
    "make",
    [nag_jax.nag, nag_jax.fista, nag_jax.ogm, nag_jax.nag_auto,
     lambda lr: nag_jax.tmm(lr, 0.1),
     lambda lr: nag_jax.fista(lr, proximal.group_l1(0.1, axis=None)),
     lambda lr: nag_jax.pogm(lr, proximal.l1(0.1), horizon=2),
     lambda lr: nag_jax.optista(lr, proximal.l1(0.1), horizon=2),
     lambda lr: nag_jax.snoo(nag_jax.nag(lr, 0.0), lr, 0.0, every=1),
     lambda lr: nag_jax.nag_then_sgd(lr, switch_step=1),
     lambda lr: nag_jax.nag(lr, accumulator_dtype=nag_jax.int8_blocks(min_size=1)),
     lambda lr: optax.chain(
         optax.sgd(lr), nag_jax.accelerate(rules.estimate_sequence(lambda k: lr * k)))],
)  # fmt: skip
def test_nothing_is_nan_at_a_learning_rate_of_0(make):
    optimizer, params = make(0.0), example_params()
    with jax.debug_nans(True):
        state = optimizer.init(params)
        for _ in range(2):
            params, state = step_of(optimizer)(params, state)
    jax.tree.map(np.testing.assert_array_equal, params, example_params())


SPECS = (P(None, "model"), P("model"), P("data", "model"), P(("model", "data")))


def explicit_mesh():
    return jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)


def split_loss(params):
    return jnp.sum((jnp.abs(params["w"]) - 0.3) ** 2) + jnp.sum((params["b"] - 1.0) ** 2)


def split_step(optimizer):
    def step(params, state):
        value, gradient = jax.value_and_grad(split_loss)(params)
        extra = dict(value=value, value_fn=split_loss)
        updates, state = optimizer.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@every_state
def test_parameters_split_over_explicit_axes(make):
    """Tracing is enough: Explicit axes are part of the types."""
    if make is EVERY["monotone_fista"]:
        make = lambda: optax.chain(optax.sgd(0.1), nag_jax.monotone_fista(split_loss))
    mesh, shapes = explicit_mesh(), {"w": (16, 8), "b": (8,)}
    if make is EVERY["zero1"]:
        make = lambda: nag_jax.zero1(nag_jax.nag(0.1), mesh, min_size=1)
    for spec in SPECS:
        shardings = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P(*spec[1:]))}
        abstract = lambda shape, sharding: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=sharding
        )
        params = jax.tree.map(abstract, shapes, shardings, is_leaf=lambda x: type(x) is tuple)

        def run(params, make=make):
            optimizer = make()
            state = optimizer.init(params)
            result = split_step(optimizer)(params, state)
            for old, new in zip(*map(jax.tree.leaves, ((params, state), result)), strict=True):
                assert jax.typeof(old).sharding.spec == jax.typeof(new).sharding.spec
            return nag_jax.eval_params(*result)

        with jax.set_mesh(mesh):
            jax.eval_shape(run, params)


@pytest.mark.parametrize("name", ["nag sutskever int8", "nag stochastic bfloat16"])
def test_numbers_of_parameters_split_over_explicit_axes(name):
    whole = {"w": jnp.linspace(-1.0, 1.0, 128).reshape(16, 8), "b": jnp.linspace(0.0, 1.0, 8)}

    def run(params):
        optimizer = EVERY[name]()
        state, step = optimizer.init(params), jax.jit(split_step(optimizer))
        for _ in range(3):
            params, state = step(params, state)
        return params, nag_jax.eval_params(params, state)

    mesh, expected = explicit_mesh(), run(whole)
    for spec in (P("data", "model"), P(("model", "data"))):
        sharding = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())}
        with jax.set_mesh(mesh):
            actual = run(jax.device_put(whole, sharding))
        assert actual[0]["w"].sharding.is_equivalent_to(sharding["w"], 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("shards", [1, 8])
def test_training_with_parameters_split_over_explicit_axes(shards):
    mesh, batch = explicit_mesh(), jnp.linspace(-1.0, 1.0, 128).reshape(8, 16)
    loss = lambda p, batch: jnp.mean((batch @ p - 1) ** 2)

    def trained(mesh, params):
        storage = nag_jax.int8_blocks(min_size=1, shards=shards)
        optimizer = nag_jax.nag(0.1, accumulator_dtype=storage)
        step = nag_jax.train_step(loss, optimizer, mesh=mesh)
        state = step.init(params)
        for _ in range(2):
            params, state, _ = step(params, state, batch)
        return params, state.opt_state

    start = jnp.linspace(-1.0, 1.0, 128).reshape(16, 8)
    expected, _ = trained(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), start)
    split = jax.device_put(start, NamedSharding(mesh, P("data", "model")))
    params, state = trained(mesh, split)
    for x in (params, state.m):
        assert x.addressable_shards[0].data.size == x.size / 8
    # With one block a column, the devices along "data" agree on its scale.
    scales = state.storage.scales
    assert scales.addressable_shards[0].data.shape == {1: (1, 2), 8: (4, 2)}[shards]
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_blocks_that_would_cross_devices_are_refused():
    kinds, devices = (jax.sharding.AxisType.Explicit,) * 2, jax.devices()[:6]
    mesh = jax.make_mesh((3, 2), ("data", "model"), kinds, devices=devices)
    params = jax.device_put(jnp.ones((8, 9)), NamedSharding(mesh, P("model", "data")))
    with pytest.raises(ValueError, match=r"\[2, 3\] along .* got 8; pass int8_blocks\(shards=24\)"):
        nag_jax.nag(0.1, accumulator_dtype=nag_jax.int8_blocks(min_size=1, shards=8)).init(params)
    storage = nag_jax.int8_blocks(min_size=1, shards=24)
    state = nag_jax.nag(0.1, accumulator_dtype=storage).init(params)
    assert state.storage.scales.shape == (8, 3)
    assert state.storage.scales.addressable_shards[0].data.shape == (4, 1)
