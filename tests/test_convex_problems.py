"""minimize on scikit-learn's problems: as low as its solution, without a step size."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

pytest.importorskip("sklearn")

import nag_jax
from benchmarks import convex_problems

ROOT = Path(__file__).parent.parent

NAMES = (
    pytest.param("lasso, diabetes", marks=pytest.mark.slow),
    "elastic net, diabetes",
    "non-negative, diabetes",
    "one-class SVM, breast cancer",
    "logistic, breast cancer",
    pytest.param("logistic, digits", marks=pytest.mark.slow),
)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_reaches_the_solution_of_scikit_learn(name):
    """A relative gap of 1e-9 in float64 and of 1e-6 in float32, both measured in float64."""
    exact = next(p for p in convex_problems.problems() if p.name == name)
    low = float(exact.objective(jnp.asarray(exact.solve())))
    for dtype, gap in (("float64", 1e-9), ("float32", 1e-6)):
        problem = next(p for p in convex_problems.problems(jnp.dtype(dtype)) if p.name == name)
        result = nag_jax.minimize(problem.loss, problem.start, prox=problem.prox, tol=problem.tol)
        assert result.converged
        assert result.params.dtype == dtype
        ours = float(exact.objective(result.params.astype(jnp.float64)))
        assert abs(ours - low) <= gap * low


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    convex_problems.plot(tmp_path / "gaps.png", steps=3)
    assert (tmp_path / "gaps.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/gaps.png", "there is no folder {folder}/none; name a file in a folder that exists"),
        ("gaps.xyz", "must end with .png, .pdf, .svg or another suffix that matplotlib knows"),
        ("gaps", "must end with .png, .pdf, .svg or another suffix that matplotlib knows"),
        ("folder.png", "is a folder; name a file in a folder that exists"),
    ],
)
def test_where_no_plot_can_be_saved(tmp_path, monkeypatch, capsys, path, message):
    """Said at once, not after the minute that it takes to compute one."""
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["convex", f"--plot=~/{path}"])
    with pytest.raises(SystemExit) as end:
        convex_problems.main()
    place = f"error: --plot={tmp_path / path}: "
    assert end.value.code == place + message.format(folder=tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["convex", "multi_device"])
def test_help_starts_nothing(program):
    result = subprocess.run(
        [sys.executable, "-m", f"examples.{program}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.stderr == ""
    assert "-h" in result.stdout
    assert "loss 0." not in result.stdout
