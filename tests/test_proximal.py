"""Proximal operators minimize what they say; proximal steps are the papers', with their bounds."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.test_util import check_grads

import nag_jax
from nag_jax import proximal, restart, rules

STEPS = 60
RANDOM = np.random.default_rng(5)
A = RANDOM.standard_normal((15, 25))
B = A @ (np.random.default_rng(6).standard_normal(25) * (np.arange(25) < 4))
LIPSCHITZ = np.linalg.norm(A, 2) ** 2


def smooth(p):
    return jnp.sum((A @ p - B) ** 2) / 2


def soft(z, threshold):
    return np.sign(z) * np.maximum(np.abs(z) - threshold, 0)


PENALTIES = {
    "l1": (proximal.l1(0.7), lambda z: 0.7 * jnp.sum(jnp.abs(z))),
    "elastic_net": (
        proximal.elastic_net(0.4, 0.6),
        lambda z: 0.4 * jnp.sum(jnp.abs(z)) + 0.3 * jnp.sum(jnp.abs(z) ** 2),
    ),
    "group_l1": (
        proximal.group_l1(0.7),
        lambda z: 0.7 * jnp.sum(jnp.sqrt(jnp.sum(jnp.abs(z) ** 2, axis=-1))),
    ),
    "group_l1 rows and columns": (
        proximal.group_l1(0.7, axis=None),
        lambda z: 0.7 * jnp.sqrt(jnp.sum(jnp.abs(z) ** 2)),
    ),
    "non-negative l1": (
        proximal.l1(0.7, nonnegative=True),
        lambda z: jnp.where(jnp.all(z >= 0), 0.7 * jnp.sum(jnp.abs(z)), jnp.inf),
    ),
    "non-negative elastic net": (
        proximal.elastic_net(0.4, 0.6, nonnegative=True),
        lambda z: jnp.where(jnp.all(z >= 0), jnp.sum(0.4 * z + 0.3 * z**2), jnp.inf),
    ),
    "sorted_l1": (
        proximal.sorted_l1(jnp.linspace(1.0, 0.0, 12).reshape(4, 3)),
        lambda z: jnp.sum(jnp.linspace(1.0, 0.0, 12) * jnp.sort(jnp.abs(z).ravel())[::-1]),
    ),
    "total_variation": (
        proximal.total_variation(0.4),
        lambda z: 0.4 * jnp.sum(jnp.abs(jnp.diff(z, axis=-1))),
    ),
    "total_variation along columns": (
        proximal.total_variation(0.2, axis=0),
        lambda z: 0.2 * jnp.sum(jnp.abs(jnp.diff(z, axis=0))),
    ),
    "nuclear": (
        proximal.nuclear(0.5),
        lambda z: 0.5 * jnp.sum(jnp.linalg.svd(z, compute_uv=False)),
    ),
    "nonnegative": (proximal.nonnegative(), lambda z: jnp.where(jnp.all(z >= 0), 0.0, jnp.inf)),
    "box": (
        proximal.box(-0.5, 0.3),
        lambda z: jnp.where(jnp.all((z >= -0.5) & (z <= 0.3)), 0.0, jnp.inf),
    ),
    "projection": (
        proximal.projection(optax.projections.projection_l2_ball, scale=1.5),
        lambda z: jnp.where(jnp.sum(z**2) <= 1.5**2 + 1e-9, 0.0, jnp.inf),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("step", [0.3, 4.0])
@pytest.mark.parametrize("name", PENALTIES)
def test_prox_minimizes_its_definition(name, step):
    """No small or large change of the result lowers penalty + distance^2/(2 step)."""
    prox, penalty = PENALTIES[name]
    complex_too = name.startswith(("l1", "elastic", "group"))
    rng = np.random.default_rng(0)
    for dtype in (float, complex) if complex_too else (float,):
        draw = lambda *n, dtype=dtype: (
            rng.standard_normal(n) + (1j * rng.standard_normal(n) if dtype is complex else 0)
        )
        p = jnp.asarray(draw(4, 3))
        z = prox(p, step)
        assert z.dtype == p.dtype
        total = lambda z, p=p: penalty(z) + jnp.sum(jnp.abs(z - p) ** 2) / (2 * step)
        dense = [size * draw(500, 4, 3) for size in (1e-4, 1e-2, 1.0)]
        sparse = [np.where(rng.random((500, 4, 3)) < 0.2, d, 0) for d in (1e-3, -1e-3, 0.1)]
        changes = jnp.concatenate([*dense, *sparse, -0.01 * z[None], -z[None]])
        candidates = z[None] + changes
        assert np.isfinite(total(z))
        assert np.all(jax.vmap(total)(candidates) >= total(z) - 1e-12)


def test_prox_of_trees():
    tree = {"w": jnp.array([2.0, -0.3]), "b": jnp.array(0.1), "none": None}
    shrunk = proximal.l1({"w": 1.0, "b": 0.0, "none": None})(tree, 0.5)
    np.testing.assert_allclose(shrunk["w"], [1.5, 0.0])
    assert shrunk["b"] == tree["b"]
    everywhere = proximal.l1(1.0)(tree, 0.5)
    assert everywhere["b"] == 0
    low = {"w": jnp.array([0.0, -1.0]), "b": 0.5, "none": None}
    np.testing.assert_allclose(proximal.box(low, np.inf)(tree, 1.0)["w"], [2.0, -0.3])
    assert proximal.box(low, np.inf)(tree, 1.0)["b"] == 0.5


PROJECTIONS = {
    "projection_simplex": {},
    "projection_l1_ball": {},
    "projection_l2_ball": {},
    "projection_l1_sphere": {},
    "projection_l2_sphere": {},
    "projection_linf_ball": {},
    "projection_non_negative": {},
    "projection_hypercube": {},
    "projection_box": dict(lower=-0.1, upper=0.2),
    "projection_hyperplane": dict(a=jnp.ones(6), b=1.0),
    "projection_halfspace": dict(a=jnp.ones(6), b=-1.0),
    "projection_vector": dict(a=jnp.ones(6)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_projection_of_optax(name):
    """From an infeasible start every evaluated iterate is feasible, and it converges."""
    project = getattr(optax.projections, name)
    prox = proximal.projection(project, **PROJECTIONS[name])
    target = jnp.array([0.9, -0.4, 0.3, 0.1, -2.0, 1.2])
    tx = optax.chain(proximal.prox_step(prox, 0.5), nag_jax.accelerate(rules.fista()))
    params = 10 + jnp.arange(6.0)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params - target, state, params)
        params = optax.apply_updates(params, updates)
        x = nag_jax.eval_params(params, state)
        return params, state, x, prox(x, 0.5)

    for _ in range(60):
        params, state, x, projected = step(params, state)
        np.testing.assert_allclose(projected, x, atol=1e-5)
    np.testing.assert_allclose(x, prox(target, 0.5), atol=1e-2)


def test_projections_are_not_taken_for_a_prox():
    with pytest.raises(ValueError, match=r"optax's projection_simplex.*proximal\.projection"):
        proximal.prox_step(optax.projections.projection_simplex, 0.1)


def lasso(x, l1reg=None, scaling=1.0):
    """What jaxopt's looks like."""
    return jax.tree.map(lambda z: soft(np.asarray(z), l1reg * scaling), x)


class Elastic:
    def __call__(self, x, hyperparams=(1.0, 1.0), scaling=1.0):
        return x


TAKERS = {
    "prox_step": lambda prox: proximal.prox_step(prox, 0.1),
    "fista": lambda prox: nag_jax.fista(0.1, prox),
    "pogm": lambda prox: nag_jax.pogm(0.1, prox, horizon=3),
    "optista": lambda prox: nag_jax.optista(0.1, prox, horizon=3),
    "backtracking": lambda prox: nag_jax.backtracking(prox),
    "minimize": lambda prox: nag_jax.minimize(smooth, jnp.zeros(25), prox=prox),
}
TWO = "cannot be called with a tree and a step"
NO_PROX = {
    "jaxopt's": (lasso, "its l1reg; wrap it as lambda x, step: lasso(x, l1reg=..., scaling=step)"),
    "jitted": (jax.jit(lasso), "lasso(x, l1reg=..., scaling=step)"),
    "strength given": (functools.partial(lasso, l1reg=0.1), TWO),
    "scaling given": (functools.partial(lasso, scaling=0.1), "take the step for its l1reg"),
    "object": (Elastic(), "Elastic(x, hyperparams, scaling), which would take the step for its"),
    "method": (Elastic().__call__, "take the step for its hyperparams"),
    "other names": (lambda x, weight=1.0, scaling=1.0: x, "take the step for its weight"),
    "strength first": (lambda x, strength=0.1, step=1.0: x, "(x, strength=..., step=step)"),
    "three arguments": (lambda x, strength, step: x, TWO),
    "three others": (
        lambda x, step, weight: x,
        "lambda x, step: <lambda>(x, step=step, weight=...)",
    ),
    "by keyword": (lambda x, *, step, weight=1.0: x, "lambda x, step: <lambda>(x, step=step)"),
    "simplex": (lambda x, value=1.0: x, "for its value; wrap it in proximal.projection"),
    "ball": (lambda x, max_value=1.0: x, "proximal.projection"),
    "box": (lambda x, hyperparams: x, "proximal.projection"),
    "one argument": (lambda x: x, TWO),
    "optax's": (jax.jit(optax.projections.projection_l1_ball), "optax's projection_l1_ball"),
    "factory": (proximal.box, "got box itself; call it"),
    "factory without arguments": (proximal.nonnegative, "got nonnegative itself; call it"),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_prox_of_jaxopt_is_refused_wherever_one_is_taken(taker):
    with pytest.raises(ValueError, match=r"prox must be a function \(tree, step\) -> tree, got l"):
        TAKERS[taker](lasso)


@pytest.mark.parametrize("name", NO_PROX)
def test_what_would_misuse_the_step_is_refused(name):
    prox, message = NO_PROX[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        proximal.prox_step(prox, 0.1)


def test_every_prox_and_projection_of_jaxopt_is_refused():
    with warnings.catch_warnings(action="ignore"):  # JAXopt is no longer maintained
        jaxopt = pytest.importorskip("jaxopt")
    of_prox = [getattr(jaxopt.prox, name) for name in dir(jaxopt.prox) if name[:5] == "prox_"]
    projections = [
        getattr(jaxopt.projection, name) for name in dir(jaxopt.projection) if name[:5] == "proje"
    ]
    assert min(len(of_prox), len(projections)) > 5
    for prox in of_prox + projections:
        with pytest.raises(ValueError, match="which would take the step for its"):
            proximal.prox_step(prox, 0.1)
    z = jnp.array([2.0, -0.3, 0.05])
    wrapped = lambda x, step: jaxopt.prox.prox_lasso(x, 0.7, scaling=step)
    ours, theirs = (proximal.prox_step(p, 0.1) for p in (proximal.l1(0.7), wrapped))
    expected, _ = ours.update(-z, ours.init(z), z)
    np.testing.assert_allclose(theirs.update(-z, theirs.init(z), z)[0], expected, rtol=1e-6)
    ball = proximal.projection(jaxopt.projection.projection_l2_ball, max_value=1.0)
    np.testing.assert_allclose(jnp.linalg.norm(ball(z, 0.1)), 1.0, rtol=1e-6)


def halve(z, step):
    """The prox of |z|^2/2 for a step of 1."""
    return jax.tree.map(lambda x: x / (1 + step), z)


class Ridge:
    def __call__(self, tree, t):
        return halve(tree, t)

    def method(self, v, eta, weights=None):
        return halve(v, eta)

    @jax.jit
    def jitted(v, lam):
        return halve(v, lam)


@functools.wraps(lasso)
def wrapping(x, step):
    return halve(x, step)


PROXES = {
    "plain": halve,
    "any names": lambda v, eta: halve(v, eta),
    "underscores": lambda _, __: halve(_, __),
    "defaults": lambda x, step=1.0, weights=None: halve(x, step),
    "its own scaling": lambda x, step, scaling=1.0: halve(x, step * scaling),
    "scaling is the step": lambda x, scaling: halve(x, scaling),
    "strength bound": functools.partial(lambda hyperparams, x, scaling: halve(x, scaling), 0.1),
    "keyword bound": functools.partial(lambda x, t, weight: halve(x, weight * t), weight=1.0),
    "keyword only": lambda x, gamma, *, scaling=1.0: halve(x, gamma),
    "any arguments": lambda *arguments: halve(*arguments),
    "jitted": jax.jit(halve),
    "wraps another": wrapping,
    "wraps another, jitted": jax.jit(wrapping),
    "checkpoint": jax.checkpoint(halve),
    "object": Ridge(),
    "method": Ridge().method,
    "static": Ridge.jitted,
}


@pytest.mark.parametrize("name", PROXES)
def test_a_prox_of_ones_own_may_look_as_it_likes(name):
    tx, params = proximal.prox_step(PROXES[name], 1.0), jnp.array([4.0, -2.0])
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    np.testing.assert_array_equal(updates, [-2.0, 1.0])


@pytest.mark.parametrize("taker", ["prox_step", "pogm", "backtracking"])
@pytest.mark.parametrize(
    "prox",
    [lambda x, step: jnp.sum(jnp.abs(x)), lambda x, step: (x, step), lambda x, step: halve],
    ids=["a penalty", "a pair", "a function"],
)
def test_a_prox_returns_what_it_was_given(taker, prox):
    tx, params = TAKERS[taker](prox), jnp.ones(3)
    value = dict(value=1.0, value_fn=jnp.sum)
    with pytest.raises(ValueError, match="prox must return a tree with the structure and shapes"):
        tx.update(params, tx.init(params), params, **value)


@pytest.mark.parametrize(
    ("project", "arguments"),
    [
        (0.5, {}),
        (optax.projections.projection_box, {}),
        (optax.projections.projection_simplex, dict(radius=2.0)),
        (proximal.l1(0.1), {}),
    ],
)
def test_a_projection_takes_a_tree_and_its_arguments(project, arguments):
    with pytest.raises(ValueError, match="project must be a function of a tree, with its other"):
        proximal.projection(project, **arguments)


PENALTY_TREE = {"w": jnp.array([[2.0, -0.3], [0.5, -4.0]]), "b": jnp.array([0.1, 3.0])}
MISMATCHED = {
    "fewer": (dict(strength={"w": 0.1}), r"tree that is a prefix of params, got .*'w': \*"),
    "more": (dict(strength={"w": 0.1, "b": 0.1, "c": 0.1}), "give each parameter its entry"),
    "none": (dict(strength={"w": 0.1, "b": None}), "give each parameter its entry"),
    "list": (dict(strength=[0.1, 0.2]), "numbers of one array as an array, not a list"),
    "long": (
        dict(strength={"w": 0.1, "b": np.ones(3)}),
        r"of parameter \['b'\] must be .* broadcasts to \(2,\), got shape \(3,\)",
    ),
    "too many axes": (
        dict(strength={"w": 0.1, "b": np.ones((5, 2))}),
        r"of parameter \['b'\] must be .* broadcasts to \(2,\), got shape \(5, 2\)",
    ),
}


@pytest.mark.parametrize("name", MISMATCHED)
@pytest.mark.parametrize("make", ["l1", "group_l1", "elastic l1", "elastic l2", "low", "high"])
def test_a_tree_of_strengths_or_bounds_matches_params(make, name):
    (strength,), message = MISMATCHED[name][0].values(), MISMATCHED[name][1]
    makers = {
        "l1": lambda s: proximal.l1(s),
        "group_l1": lambda s: proximal.group_l1(s, axis=()),
        "elastic l1": lambda s: proximal.elastic_net(s, 0.1),
        "elastic l2": lambda s: proximal.elastic_net(0.1, s),
        "low": lambda s: proximal.box(s, 5.0),
        "high": lambda s: proximal.box(-1.0, s),
    }
    argument = {"l1": "strength", "group_l1": "strength"}.get(make, make.split()[-1])
    with pytest.raises(ValueError, match=f"{argument}.*{message}"):
        makers[make](strength)(PENALTY_TREE, 0.5)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"w": 0.1, "b": -1.0}, r"\['b'\] must be in \[0, inf\), got -1"),
        ({"w": 0.1, "b": np.nan}, r"\['b'\] must be in \[0, inf\), got nan"),
        ({"w": 0.1, "b": "x"}, r"\['b'\] must be a number in \[0, inf\), got 'x'"),
        (np.array([0.1, -2.0]), r" must be in \[0, inf\), got -2"),
        (jnp.array([[0.1], [jnp.nan]]), r" must be in \[0, inf\), got nan"),
        (np.array([0.1, np.inf]), r" must be in \[0, inf\), got inf"),
        (jnp.ones(2, complex), " must hold real numbers, got an array of complex64"),
        (np.array(["a", "b"]), " must hold real numbers, got an array of <U1"),
        (None, r" must be a number in \[0, inf\), got None"),
    ],
)
def test_every_entry_of_a_strength_is_checked_where_it_is_given(strength, message):
    for make in (proximal.l1, proximal.group_l1, lambda s: proximal.elastic_net(0.1, s)):
        with pytest.raises(ValueError, match=rf"^(strength|l2){message}"):
            make(strength)


def test_bounds_are_checked():
    for low, high, got in (
        (np.array([0.0, 2.0]), 1.0, "low=2.0, high=1.0"),
        (0.0, jnp.array([[1.0], [-1.0]]), "low=0.0, high=-1.0"),
        ({"w": 0.0, "b": 3.0}, {"w": 1.0, "b": jnp.ones(2)}, "low=3.0, high=1.0"),
    ):
        with pytest.raises(ValueError, match=r"low.* must not be above high.*, got " + got):
            proximal.box(low, high)
    tree = {"w": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"low\['b'\] must not be above high\['b'\]"):
        proximal.box({"w": 0.0, "b": 3.0}, 1.0)(tree, 0.1)  # known once both meet the tree
    for wrong in (np.nan, np.array([0.0, np.nan]), None, "x"):
        with pytest.raises(ValueError, match="low must be"):
            proximal.box(wrong, 1.0)
    same = proximal.box(jnp.float32(0.1), 0.1)  # in float32 they are
    np.testing.assert_allclose(same(jnp.array([0.0, 1.0]), 0.5), 0.1, rtol=1e-6)


def test_strengths_and_bounds_of_each_kind_have_their_effect():
    tree, step = PENALTY_TREE, 0.5
    rows = np.array([[1.0], [2.0]])
    for strength in ({"w": rows, "b": 0.2}, {"w": jnp.asarray(rows), "b": np.float32(0.2)}):
        shrunk = proximal.l1(strength)(tree, step)
        np.testing.assert_allclose(shrunk["w"], soft(np.asarray(tree["w"]), step * rows), rtol=1e-6)
        np.testing.assert_allclose(shrunk["b"], [0.0, 2.9], rtol=1e-6)
        norms = np.linalg.norm(tree["w"], axis=1, keepdims=True)
        scale = np.maximum(norms - step * rows, 0) / norms
        grouped = proximal.group_l1(strength)(tree, step)["w"]
        np.testing.assert_allclose(grouped, scale * tree["w"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"broadcasts to \(2, 1\), got shape \(2, 2\)"):
        proximal.group_l1({"w": np.ones((2, 2)), "b": 0.2})(tree, step)
    ridge = proximal.elastic_net({"w": 0.0, "b": 0.2}, {"w": rows, "b": 0.0})(tree, step)
    np.testing.assert_allclose(ridge["w"], tree["w"] / (1 + step * rows), rtol=1e-6)
    clipped = proximal.box({"w": -rows, "b": -np.inf}, 1.0)(tree, step)
    np.testing.assert_allclose(clipped["w"], [[1.0, -0.3], [0.5, -2.0]], rtol=1e-6)


def test_derivatives_in_a_traced_strength():
    """The prox of a lasso falls by step for each unit of strength, where it is not 0."""
    z = {"w": jnp.array([2.0, -3.0, 0.1]), "b": jnp.array([4.0])}
    total = lambda s: sum(jnp.sum(x) for x in jax.tree.leaves(proximal.l1(s)(z, 0.5)))
    gradient = jax.jit(jax.grad(total))({"w": jnp.array([1.0, 1.0, 1.0]), "b": 1.0})
    np.testing.assert_allclose(gradient["w"], [-0.5, 0.5, 0.0])
    np.testing.assert_allclose(gradient["b"], -0.5)
    low = jax.grad(lambda low: jnp.sum(proximal.box(low, 2.0)(z["w"], 0.5)))(0.3)
    np.testing.assert_allclose(low, 2.0)
    with pytest.raises(ValueError, match="tree that is a prefix of params"):
        jax.jit(jax.grad(total))({"w": 1.0})


def proximal_reference(step_size, momentum, steps, prox=soft):
    """x' = prox(y - lr grad(y), lr*0.3), y' = x' + momentum (x' - x)."""
    x = y = np.zeros(25)
    ys, xs = [y], [x]
    for k in range(steps):
        lr = step_size(k)
        old, x = x, prox(y - lr * A.T @ (A @ y - B), 0.3 * lr)
        y = x + momentum(k) * (x - old)
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def trajectory(tx, start, steps=STEPS, loss=smooth, read=nag_jax.eval_params):
    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, read(params, state))

    start = jnp.asarray(start)
    run = jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[1])
    ys, xs = run((start, tx.init(start)))
    return np.concatenate([start[None], ys]), np.concatenate([start[None], xs])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheduled", [False, True])
def test_fista_is_the_paper(scheduled):
    """The learning rate, schedule or not, is in both places: the step and the threshold."""
    rate = lambda k, xp=np: (1.0 - 0.5 * xp.sin(k / 5.0) ** 2 * scheduled) / LIPSCHITZ
    ts = reference.t_sequence(STEPS)
    expected = proximal_reference(rate, lambda k: (ts[k] - 1) / ts[k + 1], STEPS)
    lr = (lambda step: rate(step, jnp)) if scheduled else rate(0)
    tx = optax.chain(proximal.prox_step(proximal.l1(0.3), lr), nag_jax.accelerate(rules.fista()))
    for ours, theirs in zip(trajectory(tx, np.zeros(25)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_without_a_penalty_it_is_sgd():
    head = proximal.prox_step(lambda tree, step: tree, 0.9 / LIPSCHITZ)
    points = lambda head: trajectory(
        optax.chain(head, nag_jax.accelerate(rules.fista())), np.ones(25)
    )
    np.testing.assert_allclose(points(head), points(optax.sgd(0.9 / LIPSCHITZ)), atol=1e-12)


class Composite:
    """Lasso, and c*x over x >= 0 from 1, on which the bounds are nearly reached."""

    def __init__(self, slope=None):
        self.slope = slope
        if slope is None:
            self.prox, self.lr, self.start = proximal.l1(0.1), 1 / LIPSCHITZ, np.zeros(25)
            self.loss = smooth
            self.penalty = lambda x: 0.1 * np.abs(x).sum(axis=-1)
        else:
            self.prox, self.lr, self.start = proximal.nonnegative(), 1.0, np.ones(1)
            self.loss = lambda p: slope * p[0]
            self.penalty = lambda x: 0.0
        self.total = lambda x: np.array(jax.vmap(self.loss)(x)) + self.penalty(x)

    def chain(self, rule, condition=None):
        kernel = nag_jax.accelerate(rule, restart=condition)
        return optax.chain(proximal.prox_step(self.prox, self.lr), kernel)

    def solution(self):
        if self.slope is not None:
            return np.zeros(1)
        tx = self.chain(rules.fista(), restart.gradient)
        return trajectory(tx, self.start, 5000, self.loss)[1][-1]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_composite_bounds():
    problems = [Composite(), *map(Composite, (0.02, 0.05, 0.1, 0.3))]
    best = [(p, x, p.total(x[None])[0]) for p in problems for x in [p.solution()]]

    def worst(rule, bound):
        ratios = []
        for problem, solution, low in best:
            _, xs = trajectory(problem.chain(rule), problem.start, STEPS, problem.loss)
            k = np.arange(1, STEPS + 1)
            r2 = np.sum((problem.start - solution) ** 2)
            ratios.append(np.max((problem.total(xs[1:]) - low) / (bound(k) * r2 / problem.lr)))
        return max(ratios)

    fista = lambda k: 2 / (k + 1) ** 2
    simple = lambda k: 2 / (k * k + 5 * k + 2)
    descent = rules.constant(rules.Coefficients(beta=0.0, kappa=0.0))
    assert 0.7 < worst(rules.fista(), fista) <= 1 + 1e-9
    assert 0.99 < worst(rules.chambolle_dossal(2.0), simple) <= 1 + 1e-9
    assert worst(descent, fista) > 2
    assert worst(descent, simple) > 2
    assert worst(rules.chambolle_dossal(5.0), simple) > 1.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("q", [1e-1, 1e-3])
def test_strong_convexity_with_a_penalty(q):
    """F(x_k) - F* <= (1 - sqrt q)^k (F(x_0) - F* + mu/2 R^2), with a part of the solution at 0."""
    curvatures = jnp.logspace(np.log10(q), 0, 12)
    center = jnp.where(jnp.arange(12) % 3 == 1, 0.1 * q, 2.0)
    loss = lambda p: jnp.sum(curvatures * (p - center) ** 2) / 2
    total = lambda xs: np.asarray(jax.vmap(loss)(xs)) + q * np.abs(xs).sum(axis=-1)
    head = proximal.prox_step(proximal.l1(q), 1.0)
    run = lambda rule, steps: trajectory(
        optax.chain(head, nag_jax.accelerate(rule)), np.zeros(12), steps, loss
    )[1]
    solution = run(rules.strongly_convex(q), 1500)[-1]
    assert 0 < np.sum(np.abs(solution) < 1e-12) < 12
    low = total(solution[None])[0]
    first = total(np.zeros((1, 12)))[0] - low + q / 2 * np.sum(solution**2)
    bound = (1 - q**0.5) ** np.arange(1, 401) * first
    worst = lambda rule: np.max(((total(run(rule, 400)[1:]) - low) / bound)[bound > 1e-12])
    assert 0.05 < worst(rules.strongly_convex(q)) <= 1 + 1e-9
    assert worst(rules.constant(rules.Coefficients(beta=0.0, kappa=0.0))) > 2


@pytest.mark.usefixtures("x64")
def test_restart_on_the_lasso():
    problem = Composite()
    low = problem.total(problem.solution()[None])[0]
    steps_to = lambda xs: int(np.argmax(problem.total(xs) - low <= 1e-9))
    _, plain = trajectory(problem.chain(rules.fista()), problem.start, 3000)
    _, restarted = trajectory(problem.chain(rules.fista(), restart.gradient), problem.start, 3000)
    assert 0 < steps_to(restarted) < 0.6 * steps_to(plain)
    zeros = lambda x: int(np.sum(np.abs(x) < 1e-12))
    assert zeros(restarted[-1]) >= 10


@pytest.mark.usefixtures("x64")
def test_monotone_fista():
    """Equal to the paper's three sequences, monotone, within FISTA's bound, and it does reject."""
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    hessian, solution = rotation * np.logspace(-3, 0, 12) @ rotation.T, rng.standard_normal(12)
    value = lambda p: (p - solution) @ hessian @ (p - solution) / 2
    gradient = lambda p: hessian @ (p - solution)
    steps = 600
    x = y = np.zeros(12)
    t, rejected, ys, xs = 1.0, 0, [], []
    for _ in range(steps):
        z, old, new = y - gradient(y), x, (1 + np.sqrt(1 + 4 * t * t)) / 2
        x = z if value(z) <= value(x) else x
        rejected += x is old
        y = x + t / new * (z - x) + (t - 1) / new * (x - old)
        t = new
        ys.append(y)
        xs.append(x)
    loss = lambda p: (p - solution) @ jnp.asarray(hessian) @ (p - solution) / 2
    monotone = optax.chain(optax.sgd(1.0), nag_jax.monotone_fista(loss))
    our_ys, our_xs = trajectory(monotone, np.zeros(12), steps, loss)
    assert rejected > 20
    np.testing.assert_allclose(our_ys[1:], np.stack(ys), rtol=0, atol=1e-9)
    np.testing.assert_allclose(our_xs[1:], np.stack(xs), rtol=0, atol=1e-9)
    values = np.array([value(x) for x in our_xs])
    assert np.all(np.diff(values) <= 1e-14)
    k = np.arange(1, steps + 1)
    assert np.all(values[1:] <= 2 * np.sum(solution**2) / (k + 1) ** 2)
    plain = optax.chain(optax.sgd(1.0), nag_jax.accelerate(rules.fista()))
    _, plain_xs = trajectory(plain, np.zeros(12), steps, loss)
    assert np.any(np.diff([value(x) for x in plain_xs]) > 1e-8)
    descent = optax.chain(
        optax.sgd(1.0), nag_jax.accelerate(rules.constant(rules.Coefficients(0.0, 0.0)))
    )
    slow = np.array([value(x) for x in trajectory(descent, np.zeros(12), steps, loss)[1]])
    assert np.any(slow[1:] > 1.5 * 2 * np.sum(solution**2) / (k + 1) ** 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("rate", [0.1, lambda step: 0.1 / (1 + step)])
def test_types_are_kept(dtype, rate):
    """Updates in the gradients' dtype, a stable state, None gradients passed through."""
    tx = proximal.prox_step(proximal.l1(0.1), rate)
    params = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones(2, dtype)}
    state = tx.init(params)
    updates, new = tx.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None
    assert updates["a"].dtype == dtype
    np.testing.assert_allclose(updates["a"].astype(complex).real, -0.11, rtol=2e-2)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), state, length=2)


def test_injected_learning_rate():
    inject = optax.inject_hyperparams(proximal.prox_step, static_args="prox")
    tx = inject(prox=proximal.l1(0.1), learning_rate=0.1)
    params = jnp.ones(3)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    np.testing.assert_allclose(updates, -0.11, rtol=1e-5)


def test_monotone_fista_leaves_alone_what_has_no_gradient():
    tx = nag_jax.monotone_fista(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2))
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    updates, new = tx.update({"a": -jnp.ones(2) / 2, "b": None}, state, params)
    assert updates["b"] is None
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new.best == 3.5


def test_errors():
    with pytest.raises(ValueError, match=r"prox must be a function \(tree, step\) -> tree, got 0"):
        proximal.prox_step(0.5, 0.1)
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -0.1"):
        proximal.prox_step(proximal.l1(0.1), -0.1)
    for make in (proximal.l1, proximal.group_l1):
        with pytest.raises(ValueError, match=r"must be in \[0, inf\), got -1"):
            make(-1.0)
    with pytest.raises(ValueError, match=r"l2 must be in \[0, inf\), got -1"):
        proximal.elastic_net(0.1, -1.0)
    with pytest.raises(ValueError, match=r"low must not be above high, got low=1\.0"):
        proximal.box(1.0, 0.0)
    for tx in (proximal.prox_step(proximal.l1(0.1), 0.1), nag_jax.monotone_fista(jnp.sum)):
        with pytest.raises(ValueError, match=r"needs params: call optimizer\.update"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("params", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
def test_monotone_fista_is_so_in_low_precision(params, gradients):
    """x = params - m is float32 whatever params are, and never gets worse."""
    curvatures = jnp.logspace(-3, 0, 12)
    loss = lambda p: jnp.sum(curvatures * (p - 1) ** 2) / 2
    tx = optax.chain(optax.sgd(1.0), nag_jax.monotone_fista(loss))
    wide = lambda params: params.astype(jnp.float32)

    @jax.jit
    def step(params, state):
        g = (curvatures * (wide(params) - 1)).astype(gradients)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    p, values, kept = jnp.linspace(-1.0, 1.7, 12).astype(params), [], []
    state = tx.init(p)
    for _ in range(200):  # in one program XLA would leave out that params are rounded
        p, state = step(p, state)
        values.append(loss(nag_jax.eval_params(wide(p), state)))
        kept.append(state[1].best)
    assert np.all(np.diff(kept) <= 0)
    assert np.all(np.diff(values) <= 1e-9)
    np.testing.assert_allclose(values, kept, rtol=0, atol=1e-8)
    assert values[-1] < {"bfloat16": 0.1, "float16": 0.01, "float32": 0.001}[params] * values[0]
    assert nag_jax.eval_params(p, state).dtype == params


def test_monotone_fista_takes_any_first_step():
    tx = nag_jax.monotone_fista(lambda p: jnp.sum(p**2))
    updates, _ = tx.update(jnp.full(2, 10.0), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(updates, 10.0)


def test_monotone_fista_says_what_an_objective_is():
    with pytest.raises(ValueError, match=r"objective must be a function params -> scalar, got 0.5"):
        nag_jax.monotone_fista(0.5)
    tx = nag_jax.monotone_fista(jnp.abs)
    with pytest.raises(ValueError, match=r"what objective returns must be .* got float32\[2\]"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


def test_monotone_fista_takes_python_numbers():
    tx = nag_jax.monotone_fista(lambda p: p["a"] ** 2 + p["b"] ** 2)
    params, updates = {"a": 1.0, "b": jnp.ones([])}, {"a": -0.5, "b": jnp.float32(-0.5)}
    state = tx.init(params)
    for _ in range(2):
        out, state = tx.update(updates, state, params)
        assert out["a"] == out["b"]
        assert out["a"].dtype == jnp.float32
        assert state.m["a"] == state.m["b"]
        params = optax.apply_updates(params, out)


@pytest.mark.parametrize("axis", ["a", [0], 0.5, True, (0, 0), (0, None)])
def test_groups_need_an_axis(axis):
    with pytest.raises(ValueError, match="axis must be an int, a tuple of different ints or None"):
        proximal.group_l1(1.0, axis=axis)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [1, 2, 3, 7, 60])
def test_total_variation_meets_its_optimality_conditions(n):
    """The running sum of v - z stays within the strength, and is at the bound where z jumps."""
    for seed, strength in itertools.product(range(5), (0.0, 0.1, 1.0, 20.0)):
        v = np.cumsum(np.random.default_rng(seed).normal(size=n))
        z = np.asarray(proximal.total_variation(strength)(jnp.asarray(v), 1.0))
        pull = np.cumsum(v - z)
        assert abs(pull[-1]) < 1e-9
        assert np.all(np.abs(pull) < strength + 1e-9)
        jumps = np.diff(z)
        np.testing.assert_allclose(
            (pull[:-1] + strength * np.sign(jumps))[jumps != 0], 0, atol=1e-9
        )


@pytest.mark.usefixtures("x64")
def test_structured_penalties_have_derivatives():
    v = jnp.asarray(np.random.default_rng(0).normal(size=20))
    weights = jnp.linspace(1.0, 0.2, 20)
    for function, arguments in (
        (lambda v, s: proximal.total_variation(s)(v, 1.0), (v, 0.4)),
        (lambda v, s: proximal.sorted_l1(s)(v, 1.0), (v, weights)),
        (lambda v, s: proximal.nuclear(s)(v, 1.0), (v.reshape(5, 4), 0.4)),
    ):
        check_grads(function, arguments, order=1)


def test_structured_penalties_keep_dtypes_and_map():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.bfloat16)
    for prox in (
        proximal.total_variation(0.3), proximal.nuclear(0.3), proximal.sorted_l1(0.3)
    ):  # fmt: skip
        z = prox({"w": v, "none": None}, 0.5)["w"]
        assert z.dtype == jnp.bfloat16
        assert z.shape == v.shape
        mapped = jax.vmap(lambda v, prox=prox: prox(v, 0.5))(v)
        assert mapped.shape == v.shape
    np.testing.assert_allclose(
        proximal.sorted_l1(0.3)(v.astype(float), 0.5), proximal.l1(0.3)(v.astype(float), 0.5),
        atol=1e-6,
    )  # fmt: skip


def test_structured_penalties_name_bad_input():
    for make, leaf, message in (
        (proximal.sorted_l1, jnp.ones(3, complex), "sorted_l1 needs real leaves"),
        (proximal.total_variation, jnp.ones(3, complex), "total_variation needs real leaves"),
        (
            proximal.total_variation,
            jnp.array(1.0),
            "leaves with axis -1, got shapes",
        ),
        (proximal.nuclear, jnp.ones(3), "at least two dimensions"),
        (lambda s: proximal.l1(s, nonnegative=True), jnp.ones(3, complex), "needs real leaves"),
    ):
        with pytest.raises(ValueError, match=message):
            make(0.1)(leaf, 1.0)
    with pytest.raises(ValueError, match="strength must not increase"):
        proximal.sorted_l1(jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="needs a number as strength"):
        proximal.total_variation(jnp.ones(3))(jnp.ones(3), 1.0)
