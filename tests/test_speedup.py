"""The pieces of benchmarks/speedup: search, resuming, divergence, data, targets; and all tables."""

import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import tables
from benchmarks.readme import read_section
from benchmarks.speedup import __main__ as program
from benchmarks.speedup import cells, curves, lattice, optimizers, quadratics, report, store, tasks
from benchmarks.speedup.lattice import Lattice
from benchmarks.speedup.training import Run, Trainer, evaluations

HAS_SIZE = "consistent_rms" in inspect.signature(optax.contrib.muon).parameters
LADDER = (0.0, 0.5, 0.8, 0.9, 0.95)


@pytest.mark.parametrize(("i", "j"), [(0, 0), (11, 0), (-9, 4), (2, 4)])
def test_the_grid_extends_until_the_best_is_inside(i, j):
    """More momentum wants a smaller rate: a slanted bowl, its bottom in or outside the first."""
    height = lambda p: 100 * (p.i - i + p.j - j) ** 2 + (p.i - i) ** 2 + (p.j - j) ** 2
    shape = Lattice(0.03, 2.0, LADDER, (1, 3))
    found = lattice.search(shape, lambda points: [(height(p),) for p in points])
    assert found.best == (i, j)
    assert found.inside
    assert all(p in found.tried for p in shape.around(found.best))
    assert len(shape.start()) == len({*shape.start()}) == 2 * lattice.CHUNK


def test_a_rate_alone_is_searched_three_times_as_finely():
    shape = Lattice(0.25, 2 ** (1 / 3), (0.0,), (0,))
    rates = [shape.values(p)[0] for p in shape.start()]
    np.testing.assert_allclose(np.divide(rates[1:], rates[:-1]), 2.0)
    assert len(rates) == 2 * lattice.CHUNK
    found = lattice.search(shape, lambda points: [(abs(p.i - 25),) for p in points])
    assert found.best == (25, 0)
    assert found.inside


def test_a_search_that_is_cut_off_says_so():
    shape = Lattice(1.0, 2.0, LADDER, (1, 3))
    found = lattice.search(shape, lambda points: [(-p.i,) for p in points], most=30)
    assert not found.inside
    assert len(found.tried) <= 30
    # What is not finite is never the best.
    found = lattice.search(shape, lambda points: [(math.inf if p.i > 0 else -p.i,) for p in points])
    assert found.best.i == 0
    assert found.inside


def test_finished_rows_are_not_run_again(tmp_path, capsys):
    command = ["--quick", "--tasks", "stability", "--processes", "0", "--results", str(tmp_path)]
    chosen = ["--optimizers", "heavy_ball", "nag"]
    program.main([*command, *chosen])
    whole = json.loads((tmp_path / "stability.json").read_text())
    assert list(whole["rows"]) == ["heavy_ball", "nag"]
    kept = {"heavy_ball": whole["rows"]["heavy_ball"] | {"title": "kept"}}
    store.save(tmp_path, "stability", whole | {"rows": kept})
    capsys.readouterr()
    program.main([*command, *chosen])
    assert "heavy_ball" not in capsys.readouterr().out
    again = json.loads((tmp_path / "stability.json").read_text())["rows"]
    assert again["heavy_ball"]["title"] == "kept"
    assert again["nag"]["log10"] == whole["rows"]["nag"]["log10"]
    assert not list(tmp_path.glob("*.part"))
    store.save(tmp_path, "stability", whole | {"settings": whole["settings"] | {"steps": 7}})
    with pytest.raises(SystemExit):
        program.main([*command, *chosen])
    assert "other settings (steps)" in capsys.readouterr().err


def test_divergence_is_counted_where_theory_says():
    """SGD's best is below 2/L and twice that is not; NAG has 4/3 of 1/L at momentum near 1."""
    name = "quadratic_1e2"
    row = cells.of_quadratic(name, optimizers.OPTIMIZERS["sgd"], quick=True)
    assert row["inside"]
    assert 1.0 < row["best"]["rate"] < 2.0
    assert row["failed"] == [0, 3, 3, 3, 3]
    rates, momenta = np.array([0.5, 1.3, 1.45, 1.9, 2.1]), np.array([0.0, 0.5, 0.9])
    values = quadratics.stability("nag", rates, momenta, kappa=10.0, steps=1000)
    limit = report.limits("nag", momenta)
    np.testing.assert_allclose(limit, [2.0, 1.5, 1.357142857])
    np.testing.assert_array_equal(values < 0, rates < limit[:, None])


@pytest.mark.slow
def test_runs_are_the_same_in_one_program_and_step_by_step():
    task = tasks.TASKS["softmax_batches"](True)
    nag = optimizers.OPTIMIZERS["nag_sutskever"]
    runs = [Run(0, 0.01, 0.9), Run(1, 0.02, 0.5), Run(0, 1e30, 0.9)]
    one = Trainer(task, nag).run(runs, test=True)
    other = Trainer(task._replace(scanned=False), nag).run(runs, test=True)
    for a, b in zip(one[:2], other[:2], strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)
        assert a.test == pytest.approx(b.test, abs=1.0)
        assert a.loss < a.losses[0]
    assert [cells._failed(task, result) for result in one] == [False, False, True]
    assert [cells._failed(task, result) for result in other] == [False, False, True]
    assert cells._failed(task, one[0]._replace(loss=math.nan))
    assert len(one[0].losses) == len(evaluations(task.setting.steps))


@pytest.mark.parametrize("name", optimizers.NEWER)
def test_newer_optimizers_find_a_minimum(name):
    if "muon" in name and not HAS_SIZE:
        pytest.skip("this version of optax cannot give Muon's updates the size of Adam's")
    optimizer, setting = optimizers.NEWER[name], optimizers.Setting(80, decays=True)
    start = {"embed": jnp.ones((5, 4)), "blocks": [{"kernel": jnp.ones((4, 4))}]}
    loss = lambda params: optax.tree.norm(params, squared=True)

    @jax.jit
    def run(hyper):
        tx = optimizers.transformation(optimizer, setting, hyper)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(step, (start, tx.init(start)), length=setting.steps)[0]
        return loss(optimizer.evaluate(params, state))

    found = run({"rate": jnp.array(0.2), optimizer.second: jnp.array(0.5)})
    assert found < 0.1 * loss(start)


def test_muon_has_the_matrices_of_the_blocks():
    params, _ = tasks.TASKS["transformer"](True).start(0)
    chosen = optimizers._hidden_matrices(params)
    is_leaf = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
    paths = [path for path, _ in jax.tree.leaves_with_path(chosen, is_leaf=is_leaf)]
    assert len(paths) == 2 * 6
    assert {path[2].key for path in paths} == {
        "queries", "keys", "values", "mixed", "hidden", "output"
    }  # fmt: skip


def test_only_the_transformer_has_the_newer_optimizers():
    names = {name: set(cells.contestants(name, quick=True)) for name in ("gru", "transformer")}
    assert names["transformer"] - names["gru"] == set(optimizers.NEWER)


def test_images_of_curves():
    images = curves.images(50, 12, seed=0)
    assert images.shape == (50, 144)
    assert images.min() >= 0
    assert images.max() <= 1
    np.testing.assert_array_equal(images, curves.images(50, 12, seed=0))
    assert not np.array_equal(images, curves.images(50, 12, seed=1))
    ink = (images > 0.5).sum(1)
    assert ink.min() >= 3  # a line, neither a dot nor a blot
    assert ink.max() < 60
    points = np.random.default_rng(0).uniform(0.1, 0.9, (50, 3, 2))
    for end in (0, 2):  # a curve joins its first and its last point
        pixel = (points[:, end] * 12).astype(int)
        assert images[np.arange(50), pixel[:, 0] * 12 + pixel[:, 1]].min() > 0.4


def test_the_autoencoder_starts_sparse():
    layers = curves.start((40, 20, 5), seed=0)
    assert [kernel.shape for kernel, _ in layers] == [(40, 20), (20, 5), (5, 20), (20, 40)]
    for kernel, bias in layers:
        incoming = (np.asarray(kernel) != 0).sum(0)
        assert set(incoming) == {min(curves.INCOMING, len(kernel))}
        assert not bias.any()
    loss, error = curves.losses(layers, curves.images(8, 6, 0)[:, :40].repeat(2, 1)[:, :40])
    assert loss > 0
    assert error > 0


def rows_of(curve):
    return dict(curves=[curve, curve], scores=[curve, curve], loss=[curve[-1]] * 2, tried=[])


def test_steps_to_targets():
    result = {
        "points": [0, 1, 2, 4, 8],
        "rows": {
            "sgd": rows_of([10.0, 8.0, 4.0, 1.0, 0.5]),
            "nag": rows_of([10.0, 0.9, 0.7, 0.4, 0.3]),
            "adam": rows_of([10.0, 20.0, None, None, None]),
        },
    }
    sgd, nag, adam = (report.to_loss(result, key) for key in ("sgd", "nag", "adam"))
    assert (sgd.each, nag.each, adam.each) == ([8, 8], [1, 1], [None, None])  # 0.975
    assert report.ratio(sgd, nag) == 8.0
    assert report.ratio(sgd, adam) is None
    assert report.to_loss(result, "sgd", 1.0).each == [8, 8]
    assert report.to_loss(result, "nag", 1.0).each == [4, 4]


@pytest.mark.parametrize("section", list(tables.sections()), ids=lambda s: s[0])
def test_the_committed_tables_are_those_of_the_committed_results(section):
    name, text, path = section
    assert read_section(name, path) == text
