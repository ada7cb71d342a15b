"""nag against SGD with Nesterov momentum of optax, PyTorch and Keras, step by step."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nag_jax

STEPS = 110
DEVICES = 8
# How far apart two correct roundings of the same numbers may drift on this problem.
TOLERANCE = {"float32": 2e-6, "complex64": 2e-6, "float64": 1e-13, "bfloat16": 3e-2}


def warmup_decay(step):
    """From 0 up over 10 steps, then down, with a jump: everything a schedule does."""
    step = jnp.asarray(step, float)
    return 0.12 * jnp.minimum(step / 10, 1.0) / (1 + 0.02 * step) * jnp.where(step > 70, 0.3, 1.0)


def momentum_schedule(step, low=0.0):
    """Through 0 and back, where a form that divides by the momentum breaks."""
    step = jnp.asarray(step, float)
    return jnp.where((step > 20) & (step < 25), low, 0.5 + 0.45 * jnp.sin(step / 9) ** 2)


RATES = {"constant": 0.1, "scheduled": warmup_decay}
MODES = ["eager", "jit", "pmap", "scan"]
WRAPPERS = {
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "multisteps": lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
    "coupled decay": lambda tx: optax.chain(optax.add_decayed_weights(0.03), tx),
}


def pairwise(firsts, seconds):
    """Every pair of the two with one of RATES, so that each of them also meets both rates."""
    numbered = itertools.product(enumerate(firsts), enumerate(seconds))
    return [(a, b, [*RATES][(i + j) % 2]) for (i, a), (j, b) in numbered]


# MultiSteps compiles a cond anew at every eager step: half a minute for these 110.
PIPELINES = [p for p in pairwise(MODES, WRAPPERS) if p[:2] != ("eager", "multisteps")]


def problem(dtype):
    """Least squares over 64 samples, and a start that is 2 away from the solution."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (
        rng.standard_normal(shape)
        + (1j * rng.standard_normal(shape) if dtype == "complex64" else 0)
    )
    batch = {"x": jnp.asarray(draw(64, 5), dtype), "y": jnp.asarray(draw(64), dtype)}
    params = {"w": jnp.asarray(draw(5), dtype), "b": jnp.asarray(draw(), dtype)}

    def loss(params, batch):
        residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(jnp.abs(residual) ** 2) / 2

    return loss, params, batch


def trajectory(optimizer, dtype, mode):
    """The params of every step, stacked: ``[STEPS, ...]``."""
    loss, params, batch = problem(dtype)

    def step(carry, batch, mean=lambda g: g):
        params, state = carry
        gradients = mean(jax.tree.map(jnp.conj, jax.grad(loss)(params, batch)))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = params, optimizer.init(params)
    if mode == "scan":
        scan = lambda carry, _: (new := step(carry, batch), new[0])
        return jax.jit(lambda carry: jax.lax.scan(scan, carry, length=STEPS)[1])(carry)
    if mode == "pmap":
        mean = functools.partial(jax.lax.pmean, axis_name="data")
        step = jax.pmap(
            functools.partial(step, mean=mean), "data", in_axes=(None, 0), out_axes=None
        )
        batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    elif mode == "jit":
        step = jax.jit(step)
    history = []
    for _ in range(STEPS):
        carry = jax.block_until_ready(step(carry, batch))
        history.append(jax.device_get(carry[0]))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history)


def assert_same_numbers(ours, theirs, dtype="float32", mode="jit"):
    expected = trajectory(theirs, dtype, mode)
    actual = trajectory(ours, dtype, mode)
    to_wide = lambda tree: jax.tree.map(
        lambda x: np.asarray(x, complex if dtype == "complex64" else float), tree
    )
    tolerance = TOLERANCE[dtype]
    chex.assert_trees_all_close(to_wide(actual), to_wide(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "dtype", "rate"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        if case[0] == "eager" and case[1] != "float32"
        else case
        for case in pairwise(MODES, TOLERANCE)
    ],
)
def test_equals_optax_sgd(mode, dtype, rate, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    theirs = optax.sgd(RATES[rate], 0.9, nesterov=True)
    assert_same_numbers(nag_jax.nag(RATES[rate], 0.9), theirs, dtype, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "wrapper", "rate"), PIPELINES)
def test_equals_optax_sgd_in_a_pipeline(mode, wrapper, rate):
    wrap = WRAPPERS[wrapper]
    theirs = wrap(optax.sgd(RATES[rate], 0.9, nesterov=True))
    assert_same_numbers(wrap(nag_jax.nag(RATES[rate], 0.9)), theirs, mode=mode)


def test_own_coupled_weight_decay_equals_the_chain():
    theirs = WRAPPERS["coupled decay"](optax.sgd(warmup_decay, 0.9, nesterov=True))
    assert_same_numbers(nag_jax.nag(warmup_decay, 0.9, weight_decay=0.03), theirs)


def test_equals_optax_sgd_with_scheduled_momentum():
    theirs = optax.inject_hyperparams(optax.sgd)(warmup_decay, momentum_schedule, nesterov=True)
    assert_same_numbers(nag_jax.nag(warmup_decay, momentum_schedule), theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_tells_nesterov_from_heavy_ball(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    with pytest.raises(AssertionError):
        assert_same_numbers(nag_jax.nag(0.1, 0.9), optax.sgd(0.1, 0.9), dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_equals_torch_sgd(rate, scheduled):
    torch = pytest.importorskip("torch")
    # Not through 0: at exactly 0 PyTorch leaves its buffer as it was.
    momentum = functools.partial(momentum_schedule, low=1e-3) if scheduled else 0.9
    at = lambda value, step: float(value(step)) if callable(value) else value
    _, params, batch = problem("float64")
    tensor = lambda x: torch.tensor(np.asarray(x))
    x, y = tensor(batch["x"]), tensor(batch["y"])
    w, b = (tensor(params[k]).requires_grad_() for k in ("w", "b"))
    optimizer = torch.optim.SGD([w, b], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03)
    expected = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = at(RATES[rate], step)
        optimizer.param_groups[0]["momentum"] = at(momentum, step)
        optimizer.zero_grad()
        (((x @ w + b - y) ** 2).mean() / 2).backward()
        optimizer.step()
        expected.append({"w": w.detach().numpy().copy(), "b": b.detach().numpy().copy()})
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    ours = nag_jax.nag(RATES[rate], momentum, weight_decay=0.03)
    chex.assert_trees_all_close(
        trajectory(ours, "float64", "jit"), expected, rtol=1e-12, atol=1e-12
    )


# What docs/migrating/keras.md says: the arguments of keras.optimizers.SGD, and what they are here.
KERAS = {
    "nesterov": (dict(nesterov=True), lambda lr: nag_jax.nag(lr, 0.9, convention="sutskever")),
    "heavy ball": (
        {},
        lambda lr: optax.chain(optax.sgd(lr), nag_jax.accelerate(nag_jax.rules.heavy_ball(0.9))),
    ),
    "weight decay": (
        dict(nesterov=True, weight_decay=0.03),
        lambda lr: nag_jax.nag(
            lr, 0.9, convention="sutskever", weight_decay=0.03, decay="decoupled"
        ),
    ),
    "clipping": (
        dict(nesterov=True, global_clipnorm=0.5),
        lambda lr: optax.chain(
            optax.clip_by_global_norm(0.5), nag_jax.nag(lr, 0.9, convention="sutskever")
        ),
    ),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", KERAS)
def test_equals_keras_sgd(case, rate, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    arguments, make = KERAS[case]
    loss, params, batch = problem("float32")
    gradient = jax.jit(jax.grad(loss))
    variables = {k: keras.Variable(p, name=k) for k, p in params.items()}
    theirs = keras.optimizers.SGD(0.1, momentum=0.9, **arguments)
    theirs.build(list(variables.values()))
    expected = []
    for step in range(STEPS):
        theirs.learning_rate = float(RATES[rate](step)) if callable(RATES[rate]) else RATES[rate]
        g = gradient({k: v.value for k, v in variables.items()}, batch)
        theirs.apply([g[k] for k in variables])
        expected.append({k: np.asarray(v.value) for k, v in variables.items()})
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    ours = trajectory(make(RATES[rate]), "float32", "jit")
    chex.assert_trees_all_close(
        ours, expected, rtol=TOLERANCE["float32"], atol=TOLERANCE["float32"]
    )
