"""accelerate: dtypes, errors and warnings."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import rules


@pytest.mark.parametrize(
    ("params", "accumulator", "buffer"),
    [("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("complex64", None, "complex64"),
     ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16"),
     ("complex64", "float32", "complex64"), ("complex64", "bfloat16", "complex64"),
     ("complex64", "complex64", "complex64"), ("float32", "complex64", "float32"),
     ("bfloat16", "complex64", "float32"), ("float32", np.dtype("float32"), "float32")],
)  # fmt: skip
def test_buffer_dtype(params, accumulator, buffer):
    optimizer = nag_jax.accelerate(rules.nesterov(0.9), accumulator_dtype=accumulator)
    state = optimizer.init(jnp.ones(3, params))
    assert state.m.dtype == buffer
    updates, state = optimizer.update(jnp.ones(3, params), state)
    assert (updates.dtype, state.m.dtype) == (params, buffer)


@pytest.mark.usefixtures("x64")
def test_complex_buffers_as_in_optax():
    params = {"c": jnp.array([1 + 2j, 3j], jnp.complex64), "r": jnp.ones(2, jnp.float32)}
    for dtype in (jnp.complex64, jnp.complex128):
        nag = nag_jax.nag(0.1, 0.9, accumulator_dtype=dtype)
        sgd = optax.sgd(0.1, 0.9, nesterov=True, accumulator_dtype=dtype)
        state, theirs = nag.init(params), sgd.init(params["c"])
        assert state.m["c"].dtype == dtype
        assert state.m["r"].dtype == jnp.finfo(dtype).dtype
        for _ in range(3):
            updates, state = nag.update(params, state)
            expected, theirs = sgd.update(params["c"], theirs)
        np.testing.assert_allclose(updates["c"], expected, rtol=1e-6)
        outer = nag_jax.lookahead(nag, slow_dtype=dtype).init(params)
        assert (outer.slow["c"].dtype, outer.slow["r"].dtype) == (dtype, state.m["r"].dtype)


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
    assert nag_jax.eval_params({}, state) == {}
    state = optimizer.init(1.0)
    updates, state = optimizer.update(jnp.float32(1.0), state)
    np.testing.assert_allclose(updates, -0.19, rtol=1e-6)


def barriers(optimizer, leaves):
    """The types of the arrays that XLA must keep apart from what uses them, as it is given them."""
    params = [jnp.ones(3 + i) for i in range(leaves)]
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params))
    return re.findall(r"optimization_barrier %\S+ : tensor<(\w+)>", lowered.as_text())


def test_the_scalars_of_the_buffer_are_one_array():
    """It lets XLA merge the kernels of small leaves on a GPU, which no CPU program shows."""
    assert barriers(nag_jax.accelerate(rules.fista()), 3) == ["2xf32"]
    assert barriers(nag_jax.accelerate(rules.nesterov(0.9)), 3) == ["2xf32"]


def test_the_sum_over_leaves_is_computed_once():
    """Some versions of XLA on CPU repeat it for each leaf, so its input is tested."""
    restarting = nag_jax.accelerate(rules.fista(), restart="gradient")
    assert barriers(restarting, 3) == ["f32"]
    assert barriers(restarting, 1) == []


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (rules.fista, r"rule must be a nag_jax\.rules\.Rule, got fista; call it, as in fista\(\)"),
        (0.9, r"rule must be a nag_jax\.rules\.Rule, got 0\.9; pass one, such as"),
        (None, r"got None; pass one"),
    ],
)
def test_what_is_not_a_rule_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        nag_jax.accelerate(rule)
