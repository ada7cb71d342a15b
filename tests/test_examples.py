"""The stand-alone examples, each run through its ``main`` for a few steps on real data."""

import ast
import gzip
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

import matplotlib.image
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

from examples import char_rnn, cnn, convex, diloco, gan, linen_mlp, mlp, regression, resnet

ROOT = Path(__file__).parent.parent
NAMES = (
    "char_rnn",
    "cnn",
    "convex",
    "diloco",
    "gan",
    "linen_mlp",
    "mlp",
    "multi_device",
    "regression",
    "resnet",
)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


@pytest.fixture
def multi_device(monkeypatch):
    # It sets variables for programs that start with it. Other tests must not inherit them.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setenv("PJRT_NPROC", os.environ["PJRT_NPROC"])
    return importlib.import_module("examples.multi_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a part of Fashion-MNIST, or of the digits where that is not installed."""
    folder = tmp_path_factory.mktemp("data")
    first = 0
    for split, count in (("train", 1280), ("t10k", 256)):
        images, labels = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        if FASHION_MNIST.exists():
            pixels = gzip.decompress((FASHION_MNIST / images).read_bytes())[16:]
            classes = gzip.decompress((FASHION_MNIST / labels).read_bytes())[8:]
        else:
            digits = load_digits()
            large = np.pad(digits.images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
            pixels = (15 * large[first:]).astype(np.uint8).tobytes()
            classes = digits.target[first:].astype(np.uint8).tobytes()
            first += count
        for name, header, content in (
            (images, np.array([0x803, count, 28, 28], ">u4"), pixels[: count * 784]),
            (labels, np.array([0x801, count], ">u4"), classes[:count]),
        ):
            (folder / name).write_bytes(gzip.compress(header.tobytes() + content, 1))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_stands_alone_and_is_short(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert 60 <= len(source.splitlines()) <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {m.split(".")[0] for m in modules} & {"examples", "configs", "benchmarks"}


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_examples_is_complete(name):
    assert f"| `{name}.py` |" in (ROOT / "examples" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_interruption_ends_in_one_line(name, monkeypatch):
    def interrupted(parser, argv=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", interrupted)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    with pytest.raises(SystemExit, match=r"^interrupted") as end:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert end.value.__suppress_context__


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("multi_device")
def test_wrong_flags_are_named(name, capsys):
    main = importlib.import_module(f"examples.{name}").main
    unit = "steps" if name in ("convex", "diloco", "multi_device", "regression") else "epochs"
    for arguments, message in (
        ([f"--{unit}=two"], f"argument --{unit}: invalid int value: 'two'"),
        ([f"--{unit}=0"], f"--{unit} must be at least 1"),
        (["--sed=1"], "unrecognized arguments: --sed=1"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_mlp(tmp_path, capsys):
    accuracy = mlp.main(["--epochs", "3", "--out", str(tmp_path / "new" / "curves.png")])
    assert accuracy > 0.93
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"epoch {n:2}" for n in range(1, 4)]
    losses = [float(re.search(r"training loss (\S+),", line)[1]) for line in lines[:-1]]
    assert losses == sorted(losses, reverse=True)
    curves = matplotlib.image.imread(tmp_path / "new" / "curves.png")
    assert np.ptp(curves[..., :3]) > 0.5  # something is drawn


def test_linen_mlp():
    assert linen_mlp.main(["--epochs", "4"]) > 0.93


def state_after(epoch, folder):
    with ocp.CheckpointManager(folder) as manager:
        return jax.tree.leaves(manager.restore(epoch, args=ocp.args.StandardRestore()))


@pytest.mark.slow
def test_cnn_resumes_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    def run(name, *more):
        return cnn.main(
            ["--data", str(data), "--epochs", "3", "--out", str(tmp_path / name), *more]
        )

    expected = run("whole")
    assert expected > 0.5  # of ten classes
    train_step = cnn.train_step

    def interrupted(model, optimizer, *arguments):
        if optimizer.step[...] == 14:  # in the second epoch: one has 10 steps
            raise KeyboardInterrupt
        return train_step(model, optimizer, *arguments)

    monkeypatch.setattr(cnn, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(cnn, "train_step", train_step)
    capsys.readouterr()
    assert run("parts") == expected
    assert capsys.readouterr().out.startswith("resumed after epoch 1\nepoch  2: loss")
    for a, b in zip(*(state_after(3, tmp_path / name) for name in ("whole", "parts")), strict=True):
        np.testing.assert_array_equal(a, b)

    monkeypatch.delattr(cnn, "train_step")  # a finished run takes no step
    assert run("parts") == expected
    assert capsys.readouterr().out.startswith("finished after epoch 3\ntest accuracy")


@pytest.mark.slow
def test_cnn_refuses_the_checkpoint_of_another_model(data, tmp_path, monkeypatch, capsys):
    arguments = ["--data", str(data), "--epochs", "1", "--out", str(tmp_path)]
    cnn.main(arguments)

    class Wider(cnn.CNN):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.logits = cnn.nnx.Linear(128, 11, rngs=rngs)

    monkeypatch.setattr(cnn, "CNN", Wider)
    with pytest.raises(SystemExit):
        cnn.main(arguments)
    assert f"{tmp_path} is of another model or optimizer; change --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_copy_of_the_cnn_trains_another_model(data, tmp_path):
    """Without the repository: a file of its own, with dropout and BatchNorm added."""
    source = (ROOT / "examples" / "cnn.py").read_text()
    hidden = "nnx.relu(self.dense(x.reshape(len(x), -1)))"
    layers = "        self.logits = "
    assert source.count(hidden) == source.count(layers) == 1
    source = source.replace(hidden, f"self.dropout(self.norm({hidden}))")
    norm = "        self.norm = nnx.BatchNorm(128, rngs=rngs)\n"
    source = source.replace(
        layers, f"{norm}        self.dropout = nnx.Dropout(0.1, rngs=rngs)\n{layers}"
    )
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "nag_jax").symlink_to(ROOT / "nag_jax")  # as if it were installed
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for epochs in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "mine.py", "--data", str(data), "--epochs", epochs],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("resumed after epoch 1\nepoch  2: loss")


@pytest.mark.parametrize("module", [cnn, gan, resnet])
def test_missing_data_are_named(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["--data", str(tmp_path)])
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz is missing; 'apt install dataset-fashion-mnist'" in error
    assert "github.com/zalandoresearch/fashion-mnist" in module.__doc__  # what -h shows


@pytest.mark.slow
def test_resnet_computes_the_statistics_of_the_evaluated_iterate(data, capsys):
    resnet.main(["--data", str(data), "--epochs", "3"])
    lines = capsys.readouterr().out.splitlines()
    results = [[float(x) for x in re.findall(r"(\S+)%", line)] for line in lines]
    assert len(results) == 3
    assert results[-1][0] > 50
    assert all(refreshed != old for refreshed, old in results)


@pytest.mark.slow
def test_char_rnn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(char_rnn, "HIDDEN", 64)
    text = "\n".join(topics.values())[:60_000]
    (tmp_path / "text").write_text(text, "utf-8")
    loss = char_rnn.main(["--text", str(tmp_path / "text"), "--epochs", "4"])
    counts = np.unique(list(text), return_counts=True)[1]
    shares = counts / len(text)
    assert loss < -np.sum(shares * np.log(shares)) - 0.5  # it knows more than single characters
    progress, sample = capsys.readouterr().out.split("\n\n", 1)
    assert len(progress.splitlines()) == 4
    assert len(sample) == 401  # and the last line's end
    assert set(sample) <= set(text)


def test_char_rnn_names_what_is_wrong_with_a_text(tmp_path, capsys):
    (tmp_path / "short").write_text("to be")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (
        ("short", "--text must hold at least 4160 characters"),
        ("binary", "--text: 'utf-8' codec can't decode byte 0xff"),
        ("none", "--text: [Errno 2] No such file or directory"),
    ):
        with pytest.raises(SystemExit):
            char_rnn.main(["--text", str(tmp_path / name)])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_gan_draws_what_looks_like_its_data(data, tmp_path):
    gan.main(["--data", str(data), "--epochs", "20", "--out", str(tmp_path / "drawn.png")])
    picture = matplotlib.image.imread(tmp_path / "drawn.png")[..., 0]
    assert np.ptp(picture) > 0.5
    drawn = picture.reshape(8, 28, 8, 28).swapaxes(1, 2).reshape(64, 784)
    pixels = gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    real = np.frombuffer(pixels, np.uint8).reshape(-1, 784)
    assert np.corrcoef(drawn.mean(0), real.mean(0))[0, 1] > 0.4  # 0 without training
    assert drawn.std(0).max() > 0.1  # not one image 64 times


def test_regression():
    results = regression.main(["--steps", "500"])
    assert results[0] == pytest.approx(results[1], abs=1e-3)
    assert results[2] == pytest.approx(results[1], abs=1e-3)
    assert results[1] > 0.36  # what linear regression reaches


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_convex(tmp_path, capsys):
    curves = convex.main(["--steps", "600", "--plot", str(tmp_path / "gaps.png")])
    for title in ("lasso", "logistic regression"):
        assert curves[title, "backtracking"][-1] < 1e-12
        assert curves[title, "FISTA, restarted"][-1] < 1e-9
    assert curves["logistic regression", "gradient descent"][-1] > 1e-3
    assert all(curve.min() > -1e-12 for curve in curves.values())  # nothing below the minimum
    assert capsys.readouterr().out.count("minimize: TOLERANCE") == 2
    assert np.ptp(matplotlib.image.imread(tmp_path / "gaps.png")[..., :3]) > 0.5


def test_convex_names_a_plot_that_it_cannot_save(capsys):
    with pytest.raises(SystemExit):
        convex.main(["--plot", "gaps.xyz"])
    assert "--plot must end with .png, .pdf or .svg, got gaps.xyz" in capsys.readouterr().err


@pytest.mark.slow
def test_multi_device(multi_device, monkeypatch):
    differences = multi_device.main(["--steps", "20"])
    assert set(differences) == {"jit", "shard_map", "pmap", "jit + zero1"}
    other = multi_device.nag_jax.nag(0.1, momentum=0.8)
    monkeypatch.setattr(multi_device.nag_jax, "zero1", lambda optimizer, mesh: other)
    with pytest.raises(AssertionError, match=r"jit \+ zero1 differs by"):
        multi_device.main(["--steps", "20"])


@pytest.mark.slow
def test_diloco(capsys):
    synchronous, often, seldom = diloco.main(["--steps", "128", "--every", "8", "32"])
    assert synchronous.every == 0
    assert synchronous.bytes_per_step == 4 * (64 * 128 + 128 * 10)
    assert often.bytes_per_step == synchronous.bytes_per_step / 8
    assert seldom.bytes_per_step == synchronous.bytes_per_step / 32
    assert min(row.accuracy for row in (synchronous, often, seldom)) > 0.9
    assert len({row.loss for row in (synchronous, often, seldom)}) == 3
    with pytest.raises(SystemExit):
        diloco.main(["--steps", "128", "--every", "3"])
    assert "each --every must divide it" in capsys.readouterr().err
