"""accelerate: dtypes, errors, warnings; eval_params: through every wrapper, and its errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import rules

PARAMS = {"a": {"w": jnp.ones(3), "b": jnp.ones(2)}, "c": jnp.ones(4)}
ALL_SHIFTED = {"a": {"w": 1.0, "b": 1.0}, "c": 1.0}


def after_one_step(optimizer, params=PARAMS):
    """The state after a step on a gradient of ones: x = y + 0.1 * 0.9, where not masked."""
    gradients = jax.tree.map(jnp.ones_like, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    return state


def assert_shifted(actual, where):
    for x, scale in zip(jax.tree.leaves(actual), jax.tree.leaves(where), strict=True):
        np.testing.assert_allclose(x, 1.0 + 0.09 * scale, rtol=1e-6)


WRAPPED = {
    "alone": (nag_jax.nag(0.1), ALL_SHIFTED),
    "chain": (optax.chain(optax.clip(2.0), optax.chain(nag_jax.nag(0.1))), ALL_SHIFTED),
    "masked": (
        optax.masked(nag_jax.nag(0.1), {"a": {"w": True, "b": False}, "c": True}),
        {"a": {"w": 1.0, "b": 0.0}, "c": 1.0},
    ),
    "masked by prefix": (
        optax.masked(nag_jax.nag(0.1), {"a": False, "c": True}),
        {"a": {"w": 0.0, "b": 0.0}, "c": 1.0},
    ),
    "multisteps": (optax.MultiSteps(nag_jax.nag(0.1), 1).gradient_transformation(), ALL_SHIFTED),
    "injected": (optax.inject_hyperparams(nag_jax.nag)(0.1), ALL_SHIFTED),
    "partition": (
        optax.partition(
            {"fast": nag_jax.nag(0.1), "slow": nag_jax.nag(0.05)}, {"a": "slow", "c": "fast"}
        ),
        {"a": {"w": 0.5, "b": 0.5}, "c": 1.0},
    ),
    "masked in multisteps in injected": (
        optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.MultiSteps(
                    optax.masked(nag_jax.nag(learning_rate), {"a": True, "c": False}), 1
                ).gradient_transformation()
            )
        )(0.1),
        {"a": {"w": 1.0, "b": 1.0}, "c": 0.0},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_eval_params_finds_the_state(wrapper):
    optimizer, where = WRAPPED[wrapper]
    assert_shifted(nag_jax.eval_params(PARAMS, after_one_step(optimizer)), where)
    assert_shifted(jax.jit(nag_jax.eval_params)(PARAMS, after_one_step(optimizer)), where)
    fresh = nag_jax.eval_params(PARAMS, optimizer.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, fresh, PARAMS)


def test_eval_params_of_a_flax_optimizer():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nag_jax.nag(0.1), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    gradients = jax.tree.map(jnp.ones_like, before)
    optimizer.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    for holder in (optimizer.opt_state, optimizer):
        x = nag_jax.eval_params(params, holder)
        assert jax.tree.structure(x) == jax.tree.structure(params)
        expected = jax.tree.map(lambda p: p - 0.1, before)  # x' = y - lr*g
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), x, expected)
    nnx.update(model, x)
    with pytest.raises(ValueError, match="holds no state"):
        nag_jax.eval_params(params, nnx.state(optimizer))


def test_eval_params_errors():
    state = after_one_step(nag_jax.nag(0.1))
    with pytest.raises(ValueError, match=r"holds no state of nag_jax\.accelerate, got"):
        nag_jax.eval_params(PARAMS, optax.adam(0.1).init(PARAMS))
    twice = optax.chain(nag_jax.nag(0.1), nag_jax.nag(0.1))
    with pytest.raises(ValueError, match=r"more than one state .* parameter \['a'\]\['b'\]"):
        nag_jax.eval_params(PARAMS, twice.init(PARAMS))
    with pytest.raises(ValueError, match=r"does not belong to params: they have no \['c'\]"):
        nag_jax.eval_params({"a": PARAMS["a"]}, state)
    with pytest.raises(ValueError, match=r"\['c'\] has shape \(5,\) in params and \(4,\)"):
        nag_jax.eval_params(PARAMS | {"c": jnp.ones(5)}, state)


@pytest.mark.parametrize(
    ("params", "accumulator", "buffer"),
    [("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("complex64", None, "complex64"),
     ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16"),
     ("complex64", "float32", "complex64"), ("complex64", "bfloat16", "complex64")],
)  # fmt: skip
def test_buffer_dtype(params, accumulator, buffer):
    optimizer = nag_jax.accelerate(rules.nesterov(0.9), accumulator_dtype=accumulator)
    state = optimizer.init(jnp.ones(3, params))
    assert state.m.dtype == buffer
    updates, state = optimizer.update(jnp.ones(3, params), state)
    assert (updates.dtype, state.m.dtype) == (params, buffer)


def test_arithmetic_is_float32_in_bfloat16():
    """m' and the update are rounded once, from the float32 result."""
    state = nag_jax.AccelerateState(
        m=jnp.asarray([1.0078125], jnp.bfloat16),
        carry=jnp.zeros([], jnp.int32),
        readout=jnp.zeros([]),
    )
    u = jnp.asarray([0.0673828], jnp.bfloat16)
    updates, new = nag_jax.accelerate(rules.nesterov(0.91)).update(u, state)
    m = jnp.bfloat16(0.91 * (float(state.m[0]) + float(u[0])))
    assert new.m[0] == m
    assert updates[0] == jnp.bfloat16(np.float32(u[0]) + np.float32(m))
    assert jnp.bfloat16(0.91) * (state.m[0] + u[0]) != m


def test_evaluation_iterate_is_exact_with_a_rounded_buffer():
    """The update is made from the stored buffer, so x' = y + u to float32 accuracy."""
    kernel = nag_jax.accelerate(rules.nesterov(0.9), accumulator_dtype=jnp.bfloat16)
    params, u = jnp.float32([1.0, 2.0]), jnp.float32([0.123456, -0.654321])
    updates, state = jax.jit(kernel.update)(u, kernel.init(params))
    assert np.all(state.m != np.float32(0.9) * u)
    x = nag_jax.eval_params(params + updates, state)
    np.testing.assert_allclose(x, params + u, rtol=3e-7)


def test_hyperparameters_may_be_arrays_inside_jit():
    rate = jnp.asarray(0.1)

    def one_update(params):
        optimizer = nag_jax.nag(rate, jnp.asarray(0.9))
        return optimizer.update(params, optimizer.init(params))[0]

    np.testing.assert_allclose(jax.jit(one_update)(jnp.ones(2)), -0.19, rtol=1e-6)


def test_eval_params_refuses_a_stack_of_states():
    optimizer, params = nag_jax.nag(0.1), jnp.ones((3, 3))
    state = jax.vmap(optimizer.init)(params)
    _, state = jax.vmap(optimizer.update)(params, state)
    with pytest.raises(ValueError, match=r"a stack of \(3,\) states.*jax\.vmap"):
        nag_jax.eval_params(params, state)
    np.testing.assert_allclose(jax.vmap(nag_jax.eval_params)(params, state), 1.09, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_float64_scalars_do_not_widen_float32_params():
    optimizer = nag_jax.nag(0.1, lambda step: jnp.asarray(0.9, float))
    params = {"narrow": jnp.ones(2, jnp.float32), "wide": jnp.ones(2, jnp.float64)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert (updates["narrow"].dtype, updates["wide"].dtype) == (jnp.float32, jnp.float64)
    assert (state.m["narrow"].dtype, state.m["wide"].dtype) == (jnp.float32, jnp.float64)
    assert updates["wide"][0] == -0.1 * (1 + 0.9)


def test_low_precision_momentum_warns_once_and_only_where_it_stalls():
    narrow = jnp.ones(3, jnp.bfloat16)
    with pytest.warns(UserWarning, match="momentum 0.99 in a bfloat16 buffer") as record:
        nag_jax.nag(0.1, 0.99).init({"a": narrow, "b": narrow})
    assert len(record) == 1
    assert "accumulator_dtype=jnp.float32" in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nag_jax.nag(0.1, 0.97).init(narrow)
        nag_jax.nag(0.1, 0.99, accumulator_dtype=jnp.float32).init(narrow)
        nag_jax.nag(0.1, 0.99).init(jnp.ones(3))


def test_the_stall_that_the_warning_is_about():
    gradient = jnp.ones(1, jnp.bfloat16)

    def share_of_limit(dtype):
        kernel = nag_jax.accelerate(rules.trace(0.99), accumulator_dtype=dtype)
        step = lambda state, _: (kernel.update(gradient, state)[1], None)
        start = jax.tree.map(jnp.array, kernel.init(jnp.ones(1, jnp.float32)))
        return float(jax.lax.scan(step, start, length=2000)[0].m[0]) * (1 - 0.99)

    assert share_of_limit("float32") > 0.999
    with pytest.warns(UserWarning, match="stalls"):
        assert share_of_limit("bfloat16") < 0.9


@pytest.mark.parametrize("leaf", [jnp.arange(3), jax.random.key(0), np.ones(2, bool)])
def test_parameters_without_a_gradient_are_named(leaf):
    with pytest.raises(ValueError, match=r"parameter \['a'\]\['n'\] has dtype .*optax\.masked"):
        nag_jax.nag(0.1).init({"a": {"n": leaf}})


def test_empty_tree_and_python_scalars():
    optimizer = nag_jax.nag(0.1)
    updates, state = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}
    with pytest.raises(ValueError, match="holds no"):
        nag_jax.eval_params({}, ())
    assert nag_jax.eval_params({}, state) == {}
    state = optimizer.init(1.0)
    updates, state = optimizer.update(jnp.float32(1.0), state)
    np.testing.assert_allclose(updates, -0.19, rtol=1e-6)
