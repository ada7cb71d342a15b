"""The mean of what workers send each other in fewer bytes, with error feedback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from nag_jax.methods import communication

WORKERS = 4
SHAPES = {"matrix": (64, 128), "odd": (33, 65), "vector": (1280,), "small": (7,)}
every_dtype = pytest.mark.parametrize("dtype", communication.DTYPES)


def displacements(seed=1):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, (WORKERS, *shape))
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def start():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    return jax.vmap(lambda _: communication.start(params))(jnp.arange(WORKERS))


def meeting(dtype, weighted=False):
    def mean(tree, state, weight):
        weight = weight if weighted else None
        mean, _, state = communication.mean_of_workers(tree, state, "workers", weight, dtype)
        return mean, state

    return jax.jit(jax.vmap(mean, axis_name="workers"))


EQUAL = jnp.ones(WORKERS)


@every_dtype
def test_all_workers_get_the_same_bits(dtype):
    mean, _ = meeting(dtype)(displacements(), start(), EQUAL)
    for leaf in jax.tree.leaves(mean):
        for row in leaf[1:]:
            np.testing.assert_array_equal(row, leaf[0])


@pytest.mark.parametrize(
    ("dtype", "error"), [(jnp.bfloat16, 0.004), (jnp.int8, 0.02), (jnp.int4, 0.3)]
)
def test_the_mean_is_near_and_small_leaves_are_exact(dtype, error):
    tree = displacements()
    mean, _ = meeting(dtype)(tree, start(), EQUAL)
    for name, leaf in tree.items():
        exact = np.mean(leaf, 0)
        off = np.linalg.norm(mean[name][0] - exact) / np.linalg.norm(exact)
        assert off < (1e-6 if name == "small" else error)
        assert off > 1e-4 or name == "small"  # something was rounded


@every_dtype
def test_what_is_not_sent_is_kept(dtype):
    """Over many meetings the means add up to the displacements, except the last residuals."""
    step, state = meeting(dtype), start()
    total = jax.tree.map(lambda x: np.zeros(x.shape[1:]), displacements())
    exact = total
    for seed in range(10):
        tree = displacements(seed)
        mean, state = step(tree, state, EQUAL)
        total = jax.tree.map(lambda a, x: a + np.asarray(x[0], float), total, mean)
        exact = jax.tree.map(lambda a, x: a + np.mean(np.asarray(x, float), 0), exact, tree)
    left = jax.tree.map(lambda r: np.mean(np.asarray(r, float), 0), state.residual)
    for name in SHAPES:
        np.testing.assert_allclose(total[name] + left[name], exact[name], atol=1e-5)
        assert np.linalg.norm(left[name]) < 0.1 * np.linalg.norm(exact[name])


def test_rounding_is_right_in_the_mean_and_differs_between_workers_and_meetings():
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), displacements())
    _, state = meeting(jnp.int8)(same, start(), EQUAL)
    residual = state.residual["matrix"]
    assert not np.array_equal(residual[0], residual[1])
    # The errors have mean 0 within four standard deviations.
    assert abs(np.mean(residual)) < 4 * np.std(residual) / np.sqrt(residual.size)
    fresh = state._replace(residual=jax.tree.map(jnp.zeros_like, state.residual))
    _, again = meeting(jnp.int8)(same, fresh, EQUAL)
    assert not np.array_equal(again.residual["matrix"], residual)


@every_dtype
def test_workers_count_by_their_weights(dtype):
    tree, weights = displacements(), jnp.array([1.0, 0.0, 2.0, 1.0])
    before = start()
    before = before._replace(residual=jax.tree.map(lambda r: r + 0.125, before.residual))
    mean, state = meeting(dtype, weighted=True)(tree, before, weights)
    for name, leaf in tree.items():
        exact = np.tensordot(weights, np.asarray(leaf) + 0.125, 1) / 4
        off = np.linalg.norm(mean[name][0] - exact) / np.linalg.norm(exact)
        assert off < 0.3
        np.testing.assert_array_equal(state.residual[name][1], before.residual[name][1])
        assert name == "small" or np.any(state.residual[name][2] != before.residual[name][2])


def test_no_worker_counts():
    mean, _ = meeting(jnp.int8, weighted=True)(displacements(), start(), jnp.zeros(WORKERS))
    for leaf in jax.tree.leaves(mean):
        np.testing.assert_array_equal(leaf, 0)


def test_shard_map_gives_what_vmap_gives():
    mesh = jax.make_mesh((WORKERS,), ("workers",), (AxisType.Auto,))
    rows = PartitionSpec("workers")

    def mean(tree, state):
        tree, state = jax.tree.map(lambda x: x[0], (tree, state))
        mean, _, state = communication.mean_of_workers(tree, state, "workers", None, jnp.int8)
        return jax.tree.map(lambda x: x[None], (mean, state))

    mapped = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=rows, out_specs=rows))
    for a, b in zip(
        jax.tree.leaves(mapped(displacements(), start())),
        jax.tree.leaves(meeting(jnp.int8)(displacements(), start(), EQUAL)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@every_dtype
def test_leaves_of_other_kinds(dtype):
    z = jax.random.normal(jax.random.key(0), (WORKERS, 64, 32, 2))
    tree = {"complex": jax.lax.complex(z[..., 0], z[..., 1]), "none": None, "half": z[..., 0]}
    tree["half"] = tree["half"].astype(jnp.bfloat16)
    params = jax.tree.map(lambda x: x[0], tree) | {"none": jnp.zeros(5)}
    state = jax.vmap(lambda _: communication.start(params))(jnp.arange(WORKERS))
    mean, _ = meeting(dtype)(tree, state, EQUAL)
    np.testing.assert_allclose(mean["complex"][0], np.mean(tree["complex"], 0), rtol=1e-5)
    assert mean["none"] is None
    assert mean["half"].dtype == jnp.float32


def test_a_displacement_that_is_not_finite_is_not_hidden():
    tree = displacements()
    tree["matrix"] = tree["matrix"].at[2, 3, 4].set(jnp.nan)
    mean, _ = meeting(jnp.int8)(tree, start(), EQUAL)
    assert np.all(np.isnan(mean["matrix"][:, 3]))  # which has one scale
