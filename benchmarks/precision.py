"""The cost of momentum in low precision: bytes of state per parameter, and final losses.

    python -m benchmarks.precision [--seeds 5] [--only mlp cnn gru]

Each run of a storage starts from the same parameters and sees the same batches as the float32 run
of its seed. Losses are those of the whole training set at the evaluated iterate after the last
step. The recipes are those of ``configs``, some of them smaller, as commented.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks.machine import describe_machine
from benchmarks.shapes import SHAPES
from configs import cnn, mlp, rnn
from examples.trainer.data import datasets
from examples.trainer.tasks.choose import make_task
from nag_jax import rules

RESULTS = Path(__file__).parent / "results" / "precision.json"
STORAGES: dict[str, Any] = {
    "float32": lambda seed: jnp.float32,
    "bfloat16, nearest": lambda seed: jnp.bfloat16,
    "stochastic_bfloat16": nag_jax.stochastic_bfloat16,
    "int8_blocks": nag_jax.int8_blocks,
}
# These models are so small that nearly all of their leaves would stay float32.
TRAINED = STORAGES | {"int8_blocks": lambda seed: nag_jax.int8_blocks(seed, min_size=1024)}
# Momentum in float32; the parameters are rounded at each step.
PARAMS: dict[str, list[Any]] = {  # with these links at the end of the chain
    "bfloat16 params, nearest": [],
    "bfloat16 params, stochastic_rounding": [nag_jax.stochastic_rounding()],
}


def recipes() -> dict[str, Any]:
    small_cnn: Any = cnn.get_config()
    small_gru: Any = rnn.get_config()
    small_cnn.model.channels, small_cnn.model.hidden = (8, 16), 64  # of (32, 64), 128
    small_cnn.augment.flip, small_cnn.augment.shift, small_cnn.augment.zoom = False, 0, 0.0
    small_cnn.num_epochs, small_cnn.train_samples = 6, 6000  # of 10, 60000
    small_gru.model.hidden, small_gru.num_epochs, small_gru.train_samples = 96, 2, 6400
    whole_mlp: Any = mlp.get_config()
    whole_mlp.train_samples = 0  # all
    return {"mlp": whole_mlp, "cnn": small_cnn, "gru": small_gru}


def train(config: Any, dataset: Any, seed: int, storage: str) -> float:
    task = make_task(config, dataset, jax.random.key(seed))
    count = len(dataset.train["x"])
    chosen = np.random.default_rng(seed).permutation(count)[: config.train_samples or None]
    arrays: Any = {key: jnp.asarray(rows[chosen]) for key, rows in dataset.train.items()}
    batch = lambda index: {key: rows[index] for key, rows in arrays.items()}
    optimizer = make_optimizer(config, len(chosen), seed, storage)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        params, state = carry
        loss = lambda p: mean_loss(task, p, batch(index))
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def evaluate(carry: Any) -> jax.Array:
        params = nag_jax.eval_params(*carry)
        rows = jnp.arange(len(chosen) // 10 * 10).reshape(10, -1)
        return jnp.mean(jax.lax.map(lambda index: mean_loss(task, params, batch(index)), rows))

    params = task.params
    if storage in PARAMS:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with warnings.catch_warnings(action="ignore"):
        carry = params, optimizer.init(params)
    run = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows)[0], donate_argnums=0)
    one = jax.jit(lambda carry, row: step(carry, row)[0], donate_argnums=0)
    carry = jax.tree.map(jnp.array, carry)
    generator = np.random.default_rng(seed)
    for _ in range(config.num_epochs):
        steps = len(chosen) // config.batch_size
        rows = generator.permutation(len(chosen))[: steps * config.batch_size]
        rows = rows.reshape(steps, config.batch_size)
        if config.scan:
            carry = run(carry, rows)
        else:
            for row in rows:
                carry = one(carry, row)
    return float(evaluate(carry))


def mean_loss(task: Any, params: Any, batch: Any) -> jax.Array:
    total, (_, sums) = task.losses(params, task.rest, batch)
    return total / sums["samples"]


def make_optimizer(config: Any, samples: int, seed: int, storage: str) -> Any:
    steps = samples // config.batch_size
    total = steps * config.num_epochs
    warmup = round(config.warmup_epochs * steps) if config.num_epochs > 2 else steps // 4
    nag = nag_jax.nag(
        optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, total),
        config.momentum,
        convention=config.optimizer.convention,
        weight_decay=config.weight_decay,
        weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        accumulator_dtype=TRAINED.get(storage, lambda seed: jnp.float32)(seed),
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, nag, *PARAMS.get(storage, []))


def bytes_per_parameter(shapes: list[tuple[int, ...]], storage: Any) -> float:
    """Of all arrays in the state of ``nag``, scalars and keys included."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(nag_jax.nag(0.1, 0.9, accumulator_dtype=storage).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return size / sum(p.size for p in params)


def shares_of_limit(storage: Any, momenta: tuple[float, ...] = (0.9, 0.99, 0.999)) -> list[float]:
    """What heavy ball's update reaches of g/(1 - momentum) in 10 time constants, in mean over g."""
    gradient, shares = jnp.linspace(0.02, 1.0, 2**17), []  # int8_blocks keeps less as float32
    for momentum in momenta:
        kernel = nag_jax.accelerate(rules.heavy_ball(momentum), accumulator_dtype=storage)

        def step(carry: Any, _: None, kernel: Any = kernel) -> tuple[Any, None]:
            return kernel.update(gradient, carry[1]), None

        with warnings.catch_warnings(action="ignore"):  # nearest rounding warns of just this
            start = gradient, kernel.init(gradient)
            (update, _), _ = jax.lax.scan(step, start, length=round(10 / (1 - momentum)))
        shares.append(float(jnp.mean(update / gradient)) * (1 - momentum))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of momentum in low precision.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["mlp", "cnn", "gru"])
    arguments = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"losses": {}}
    result |= describe_machine("benchmarks.precision", ("jax", "optax", "flax"))
    result["bytes"] = {
        model: {name: bytes_per_parameter(SHAPES[model], make(0)) for name, make in
                STORAGES.items()} for model in ("ResNet-50", "GPT-2 small")
    }  # fmt: skip
    result["shares_of_limit"] = {name: shares_of_limit(make(0)) for name, make in STORAGES.items()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name in arguments.only:
        config = recipes()[name]
        dataset = datasets.load(config)
        losses = {
            storage: [train(config, dataset, seed, storage) for seed in range(arguments.seeds)]
            for storage in (*STORAGES, *PARAMS)
        }
        result["losses"][name] = losses
        result["losses_from"] = {key: result[key] for key in ("command", "date")}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        exact = np.array(losses["float32"])
        for storage, values in losses.items():
            ratios = np.array(values) / exact
            print(f"{name} {storage:38} loss {np.mean(values):.5f}, ratio of means "
                  f"{np.mean(values) / exact.mean():.4f} ({ratios.min():.4f} to "
                  f"{ratios.max():.4f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
