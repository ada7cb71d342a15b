"""Steps of many workers, as rows of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import nag_jax

AXIS = "workers"
EVERY_WAY = pytest.mark.parametrize("way", ["vmap", "shard_map", "pmap"])
ROW = PartitionSpec(AXIS)
ROWS = (ROW,) * 4  # params, state, and two arrays of data


def over_workers(function, way, count):
    """``function`` of one worker, over rows of stacks."""
    if way == "vmap":
        return jax.jit(jax.vmap(function, axis_name=AXIS))
    if way == "pmap":
        return jax.pmap(function, axis_name=AXIS, devices=jax.devices()[:count])
    return jax.jit(sharded(function, count, ROWS, ROWS[:2]))


def sharded(function, count, in_specs, out_specs):
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,))
    is_spec = lambda node: isinstance(node, PartitionSpec)
    at = lambda get, specs, trees: jax.tree.map(
        lambda spec, tree: jax.tree.map(get, tree) if spec == ROW else tree,
        specs,
        trees,
        is_leaf=is_spec,
    )

    def body(*args):
        out = function(
            *at(lambda x: x[0], in_specs if in_specs != ROW else (ROW,) * len(args), args)
        )
        return at(lambda x: x[None], out_specs if out_specs != ROW else (ROW,) * len(out), out)

    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def step_of(optimizer, exact=False, **options):
    """One update of a quadratic with the worker's own curvature and minimum."""

    def step(params, state, curvature, target):
        gradient = jax.tree.map(lambda p: curvature * (p - target), params)
        updates, state = optimizer.update(gradient, state, params, **options)
        params = optax.apply_updates(params, updates)
        return (nag_jax.resynchronize(params, state) if exact else params), state

    return step


def problem(count, size=6, dtype=jnp.float32):
    """Workers that disagree: params, curvatures and minima, a row each."""
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(rng.uniform(0.1, 1.0, (count, size)), dtype)
    target = jnp.asarray(rng.standard_normal((count, size)), dtype)
    start = jnp.asarray(np.tile(rng.standard_normal(size), (count, 1)), dtype)
    return start, curvature, target


def run(step, optimizer, steps, start, *data):
    params, state, trace = start, jax.vmap(optimizer.init)(start), []
    for _ in range(steps):
        params, state = jax.block_until_ready(step(params, state, *data))
        trace.append((params, state))
    return trace
