"""Momentum schedules against their papers' values, their accuracy, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax
from nag_jax import schedules


def follow(peak=0.5, learning_rate=0.1, start=2, end=5):
    return schedules.follow_learning_rate(peak, learning_rate, start=start, end=end)


@pytest.mark.usefixtures("x64")
def test_sutskever_is_equation_5():
    schedule = schedules.sutskever(0.995)
    for t in (0, 249, 250, 999, 12345, 10**6):
        expected = min(1 - 2 ** (-1 - np.log2(t // 250 + 1)), 0.995)
        assert abs(schedule(jnp.asarray(t)) - expected) < 1e-15
        assert abs(schedule(t) - expected) < 1e-15


def test_sutskever_ends_at_lower_momentum():
    schedule = schedules.sutskever(0.999, total_steps=20_000)
    at = lambda t: float(schedule(jnp.asarray(t)))
    assert at(18_999) == pytest.approx(1 - 0.5 / 76)
    assert at(19_000) == pytest.approx(0.9)
    assert float(schedules.sutskever(0.0, total_steps=2000)(jnp.asarray(1500))) == 0.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("a", [2.0, 3.0, 10.0])
def test_convex_is_the_chambolle_dossal_sequence(a):
    steps = jnp.arange(200)
    t = lambda k: (k + a) / a
    expected = [0.0] + [(t(k) - 1) / t(k + 1) for k in range(199)]
    np.testing.assert_allclose(jax.vmap(schedules.convex(a))(steps), expected, atol=1e-15)


def worst_function(steps):
    """Nesterov's tridiagonal quadratic, L = 1: hard for every first-order method."""
    size = 2 * steps + 1
    hessian = (2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)) / 4
    linear = np.eye(size)[0] / 4
    solution = 1 - np.arange(1, size + 1) / (size + 1)
    value = lambda x: 0.5 * x @ hessian @ x - linear @ x
    return jnp.zeros(size), lambda x: value(x) - value(solution), solution @ solution


def huber_function(steps):
    """A Huber function whose kink makes it the worst for gradient descent, L = 1."""
    kink = 1 / (2 * steps + 1)
    value = lambda x: jnp.sum(optax.losses.huber_loss(x, delta=kink))
    return jnp.ones(1), value, 1.0


def bound_violations(problem, momentum, steps=60):
    """Steps at which f(x_t) - f* > 2 L R^2/(k^2 + 5k + 6), k = t - 1."""
    params, gap, squared_distance = problem(steps)
    optimizer = nag_jax.nag(1.0, momentum, convention="sutskever")
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    count = 0
    for k in range(steps):
        updates, state = update(jax.grad(gap)(params), state)
        params = optax.apply_updates(params, updates)
        bound = 2 * squared_distance / (k**2 + 5 * k + 6)
        count += int(gap(nag_jax.eval_params(params, state)) > bound)
    return count


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("problem", [worst_function, huber_function])
def test_convex_meets_its_bound(problem):
    assert bound_violations(problem, schedules.convex()) == 0


@pytest.mark.usefixtures("x64")
def test_gradient_descent_breaks_that_bound():
    assert bound_violations(huber_function, 0.0) > 30


def test_strongly_convex_needs_about_the_root_of_the_condition_number():
    hessian = jnp.asarray(np.logspace(-4, 0, 8), jnp.float32)

    def steps_needed(momentum):
        optimizer = nag_jax.nag(1.0, momentum, convention="sutskever")
        params = jnp.ones(8)
        carry = params, optimizer.init(params)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(hessian * params, state)
            return (params + updates, state), jnp.max(jnp.abs(params))

        errors = jax.jit(lambda c: jax.lax.scan(step, c, length=5000)[1])(carry)
        return int(jnp.argmax(errors < 1e-3)) or 5000

    assert steps_needed(schedules.strongly_convex(1e-4)) < 1500
    assert steps_needed(0.0) == 5000


def test_linear_warms_up_holds_and_cools_down():
    schedule = schedules.linear(
        0.9, initial=0.5, warmup_steps=10, final=0.1, cooldown_steps=20, total_steps=100
    )
    at = lambda t: float(schedule(jnp.asarray(t)))
    expected = {0: 0.5, 5: 0.7, 10: 0.9, 50: 0.9, 80: 0.9, 90: 0.5, 100: 0.1, 1000: 0.1}
    assert {t: round(at(t), 6) for t in expected} == expected
    assert float(schedules.linear(0.8)(3)) == pytest.approx(0.8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
def test_follow_learning_rate_is_the_multiple_in_the_window(dtype):
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.03, 7, 31)
    schedule = schedules.follow_learning_rate(0.6, rate, start=5, end=20)
    cosine = lambda t: t / 7 if t < 7 else (1 + np.cos(np.pi * (t - 7) / 24)) / 2
    expected = [0.6 * cosine(t) if 5 <= t < 20 else 0.0 for t in range(40)]
    # The largest rate is that at step 7, whatever its value.
    actual = jax.jit(jax.vmap(schedule))(jnp.arange(40, dtype=dtype))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-15)
    flat = schedules.follow_learning_rate(0.6, 0.1, start=5, end=20)
    assert [float(flat(t)) for t in (4, 5, 19, 20)] == [0.0, 0.6, 0.6, 0.0]


def test_follow_learning_rate_inside_jit():
    """A traced learning rate cancels; the largest value of another is computed before."""
    falling = optax.linear_schedule(1.0, 0.0, 10)
    follow_it = lambda rate: schedules.follow_learning_rate(0.5, rate, start=0, end=9)
    at = jax.jit(lambda step, scale: follow_it(lambda t: scale * falling(t))(step))
    assert float(at(5, 3.0)) == pytest.approx(0.25)
    assert "reduce_max" in str(jax.make_jaxpr(at)(5, 3.0))
    known = jax.jit(lambda step: follow_it(falling)(step))
    assert float(known(5)) == pytest.approx(0.25)
    assert "reduce_max" not in str(jax.make_jaxpr(known)(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.sutskever(1.0), r"max_momentum must be in \[0, 1\), got 1"),
        (lambda: schedules.sutskever(period=0), "period must be an int of at least 1, got 0"),
        (lambda: schedules.sutskever(total_steps=500), "must be more than final_steps=1000"),
        (lambda: schedules.strongly_convex("1"), r"q = mu/L must be a number in \(0, 1\], got '1'"),
        (lambda: schedules.convex(1.5), r"a must be in \[2, inf\), got 1.5"),
        (lambda: schedules.strongly_convex(0.0), r"q = mu/L must be in \(0, 1\], got 0;"),
        (lambda: schedules.strongly_convex(100.0), "1/q is the condition number"),
        (lambda: follow(peak=1.0), r"peak must be in \[0, 1\), got 1"),
        (lambda: follow(start=9, end=9), "end=9 must be above start=9: the window has the steps"),
        (lambda: follow(start=9, end=5), "end=5 must be above start=9"),
        (lambda: follow(start=-1), "start must be an int of at least 0, got -1"),
        (lambda: follow(learning_rate=0), r"learning_rate must be in \(0, inf\), got 0"),
        (lambda: follow(end=2.5), "end must be an int of at least 1, got 2.5"),
        (lambda: follow(learning_rate=lambda t: 0.0), "above 0 at a step before end=5, got at mos"),
        (lambda: schedules.linear(1.2), r"momentum must be in \[0, 1\)"),
        (lambda: schedules.linear(0.9, cooldown_steps=5), "needs total_steps, where it ends"),
        (
            lambda: schedules.linear(0.9, warmup_steps=8, cooldown_steps=5, total_steps=10),
            r"total_steps=10 is shorter than warmup_steps \+ cooldown_steps = 13",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
