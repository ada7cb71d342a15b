"""The problems that are trained on: data, model, size and length of each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nag_jax
from benchmarks.auto import halved
from benchmarks.speedup import curves
from benchmarks.speedup.optimizers import NEWER, OPTIMIZERS, Setting
from benchmarks.speedup.training import Task
from configs import cnn, linear, mlp, resnet, rnn, transformer
from examples.trainer.data import datasets
from examples.trainer.tasks.choose import make_task

VALID = 1024  # held-out samples that choose the most accurate trial
RIDGE = 1e-3
FASHION = "Fashion-MNIST at 14 x 14 pixels"


@functools.cache
def _fashion(samples: int, test: int) -> datasets.Dataset:
    """Training images, and VALID others behind them."""
    return halved(datasets.load(linear.get_config()), samples + VALID, test)


def _split(arrays: dict[str, np.ndarray], count: int) -> tuple[Any, Any]:
    put = lambda part: {name: jnp.asarray(x[part]) for name, x in arrays.items()}
    return put(slice(None, count)), put(slice(count, count + VALID))


def _entropy(labels: np.ndarray) -> float:
    share = np.unique(labels, return_counts=True)[1] / labels.size
    return float(-np.sum(share * np.log(share)))


def _images(
    title: str, about: str, config: Any, samples: int, steps: int, size: int, test: int,
    decays: bool = True, seen: int = 1024, **more: Any,
) -> Task:  # fmt: skip
    dataset = _fashion(samples, test)
    make = functools.cache(lambda seed: make_task(config, dataset, jax.random.key(seed)))
    train, valid = _split(dataset.train, samples)

    def losses(params: Any, rest: Any, batch: Any) -> Any:
        total, (rest, sums) = make(0).losses(params, rest, batch)
        loss = total / sums["samples"]
        if not size:  # so that there is one minimum
            loss += RIDGE / 2 * optax.tree.norm(params, squared=True)
        return loss, (rest, 100 * sums["correct"] / sums["samples"])

    def least() -> float:
        whole = lambda params: losses(params, make(0).rest, train)[0]
        found = nag_jax.minimize(whole, make(0).params, tol=1e-6, max_steps=3000)
        return float(whole(found.params))

    return Task(
        title=title,
        about=f"{about}, {FASHION}, {samples} images, {_length(steps, size, decays)}",
        setting=Setting(steps, decays=decays),
        start=lambda seed: (make(seed).params, make(seed).rest),
        losses=losses,
        train=train,
        valid={name: x[:seen] for name, x in valid.items()},
        test={name: jnp.asarray(x) for name, x in dataset.test.items()},
        seen=min(samples, seen),
        batch_size=size,
        score="accuracy",
        higher_is_better=True,
        trivial=_entropy(dataset.train["y"][:samples]),
        low=None if size else least(),
        **more,
    )


def _length(steps: int, size: int, decays: bool) -> str:
    batch = f"batch {size}" if size else "all of them at once"
    shape = "warm-up and cosine" if decays else "constant learning rate"
    return f"{batch}, {steps} steps, {shape}"


def _configured(module: Any, **model: Any) -> Any:
    config = module.get_config()
    config.model.update(model)
    config.augment.update(flip=False, shift=0, zoom=0.0)
    return config


def softmax(quick: bool) -> Task:
    samples, steps, test = (200, 30, 200) if quick else (1000, 1000, 10000)
    config = _configured(linear)
    return _images(
        "softmax regression, full batch", f"linear model, ridge {RIDGE:g}", config, samples,
        steps, 0, test, decays=False,
    )  # fmt: skip


def softmax_batches(quick: bool) -> Task:
    samples, steps, test = (200, 30, 200) if quick else (8000, 1000, 10000)
    config = _configured(linear)
    return _images("softmax regression", "linear model", config, samples, steps, 64, test)


def perceptron(quick: bool) -> Task:
    samples, steps, test = (200, 30, 200) if quick else (8000, 1000, 10000)
    hidden = (16,) if quick else (128, 64)
    config = _configured(mlp, hidden_sizes=hidden)
    about = f"hidden layers of {' and '.join(map(str, hidden))} units"
    return _images("MLP", about, config, samples, steps, 64, test)


def convolutional(quick: bool) -> Task:
    samples, steps, test = (200, 10, 200) if quick else (8000, 400, 5000)
    channels, hidden = ((2, 2), 4) if quick else ((8, 16), 32)
    config = _configured(cnn, channels=channels, hidden=hidden)
    about = f"{channels[0]} and {channels[1]} channels, {hidden} hidden units"
    return _images(
        "CNN", about, config, samples, steps, 64, test, seen=512, ratio=1.2, scanned=False
    )


def residual(quick: bool) -> Task:
    samples, steps, test = (200, 10, 200) if quick else (8000, 150, 2500)
    channels = (2, 4) if quick else (8, 16)
    config = _configured(resnet, channels=channels, blocks=1)
    about = f"2 blocks with BatchNorm, {channels[0]} and {channels[1]} channels"
    return _images(
        "ResNet", about, config, samples, steps, 64, test, seen=512, ratio=1.3, scanned=False
    )


def _text(
    title: str, about: str, config: Any, samples: int, steps: int, size: int, seen: int, **more: Any
) -> Task:
    dataset = datasets.load(config)
    make = functools.cache(lambda seed: make_task(config, dataset, jax.random.key(seed)))
    train, valid = _split(dataset.train, samples)

    def losses(params: Any, rest: Any, batch: Any) -> Any:
        total, (rest, sums) = make(0).losses(params, rest, batch)
        return total / sums["samples"], (rest, total / sums["samples"])

    return Task(
        title=title,
        about=f"characters of Python's documentation, {about}, windows of {config.model.length}, "
        f"gradient clipped at norm 1, {_length(steps, size, True)}",
        setting=Setting(steps, decays=True, clip=config.clip_norm),
        start=lambda seed: (make(seed).params, make(seed).rest),
        losses=losses,
        train=train,
        valid={"x": valid["x"][:seen]},
        test={"x": jnp.asarray(dataset.test["x"][:VALID])},
        seen=seen,
        batch_size=size,
        score="test loss",
        higher_is_better=False,
        trivial=_entropy(dataset.train["x"][:samples, 1:]),
        fusions=tuple(config.cpu_fusions),
        **more,
    )


def recurrent(quick: bool) -> Task:
    samples, steps, size = (200, 20, 16) if quick else (12000, 400, 32)
    hidden, length = (8, 8) if quick else (48, 24)
    config = _configured(rnn, hidden=hidden, embedding=hidden // 2, length=length)
    return _text(
        "GRU", f"{hidden} units", config, samples, steps, size, 256, scale=16.0, ratio=1.12
    )


def attending(quick: bool) -> Task:
    samples, steps, size = (200, 20, 16) if quick else (12000, 400, 16)
    width, length = (8, 8) if quick else (64, 32)
    config = _configured(transformer, width=width, blocks=2, length=length)
    about = f"2 blocks of {width} units with {config.model.heads} heads"
    return _text(
        "transformer", about, config, samples, steps, size, 128, scale=4.0, ratio=1.2,
        contestants=OPTIMIZERS | NEWER,
    )  # fmt: skip


def autoencoder(quick: bool) -> Task:
    side, sizes, samples, steps, period = 12, (144, 72, 36, 18, 9, 6), 8000, 3000, 3
    if quick:
        side, sizes, samples, steps, period = 6, (36, 6), 128, 30, 1
    x = curves.images(samples + 2 * VALID, side, seed=0)
    put = lambda part: {"x": jnp.asarray(part)}

    def losses(params: Any, rest: Any, batch: Any) -> Any:
        loss, error = curves.losses(params, batch["x"])
        return loss, (rest, error)

    widths = "-".join(map(str, (*sizes, *sizes[-2::-1])))
    return Task(
        title="deep autoencoder",
        about=f"curves of {side} x {side} pixels, sigmoid layers {widths}, {samples} images, "
        f"{_length(steps, 64, False)}, momentum by the 2013 paper's schedule with period {period}",
        setting=Setting(steps, period=period),
        start=lambda seed: (curves.start(sizes, seed), ()),
        losses=losses,
        train=put(x[:samples]),
        valid=put(x[samples : samples + VALID]),
        test=put(x[samples + VALID :]),
        seen=VALID,
        batch_size=64,
        score="squared error",
        higher_is_better=False,
        trivial=float(_constant_loss(x[:samples])),
        scale=0.25,
        momenta=(0.9, 0.99, 0.995, 0.999),
    )


def _constant_loss(x: np.ndarray) -> jax.Array:
    mean = jax.scipy.special.logit(jnp.clip(jnp.asarray(x.mean(0)), 1e-6, 1 - 1e-6))
    side = x.shape[1]
    return curves.losses([(jnp.zeros((side, side)), mean)], jnp.asarray(x))[0]


TASKS: dict[str, Callable[[bool], Task]] = {
    "softmax": softmax,
    "softmax_batches": softmax_batches,
    "autoencoder": autoencoder,
    "mlp": perceptron,
    "gru": recurrent,
    "transformer": attending,
    "cnn": convolutional,
    "resnet": residual,
}
