"""The DiLoCo example: it learns, its workers may be rows or devices, its bytes are the truth."""

import re

import jax
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from configs import diloco as recipe
from examples import data, diloco
from examples.errors import UserError


@pytest.fixture
def config(tmp_path):
    """The recipe, shrunk."""
    (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 120)
    config = recipe.get_config()
    config.text_file = str(tmp_path / "text")
    config.model.update(hidden=8, embedding=4, length=16)
    config.update(batch_size=16, eval_batch_size=16, num_epochs=4)
    config.local.update(every=(1, 4), learning_rate=0.5)
    return config


def test_the_table(config, capsys):
    rows = diloco.table(config)
    assert [row.every for row in rows] == [1, 1, 4]
    assert all(row.loss < 2.6 for row in rows)  # 2.89 are the 18 characters, guessed
    assert len({row.loss for row in rows}) == 3
    assert rows[2].bytes_per_step == rows[1].bytes_per_step / 4 == rows[0].bytes_per_step / 4
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_workers_as_rows_and_as_devices_agree(config):
    """vmap on one device, and shard_map over eight."""
    dataset = data.load(config)
    rows = {}
    for mode in ("vmap", "shard_map"):
        config.local.mode = mode
        rows[mode] = diloco.run(config, dataset, 4, 0.3)
    assert rows["shard_map"].loss == pytest.approx(rows["vmap"].loss, abs=1e-5)
    assert rows["shard_map"].loss_at_params == pytest.approx(rows["vmap"].loss_at_params, abs=1e-5)


def test_the_bytes_are_those_of_the_compiled_program(config, monkeypatch):
    """Every all-reduce is of params, and once a round; none is within the loop of inner steps."""
    config.local.mode = "shard_map"
    texts, jit = [], diloco.jit

    def seen(function, *args, **kwargs):
        jitted = jit(function, *args, **kwargs)

        def call(*arguments):
            if not texts:
                texts.append(jitted.lower(*arguments).compile().as_text())
            return jitted(*arguments)

        return call

    monkeypatch.setattr(diloco, "jit", seen)
    row = diloco.run(config, data.load(config), 4, 0.3)
    reduced = re.findall(r"= (.*) all-reduce(?:-start)?\((?!.*-done)", texts[0])
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(reduced))
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    assert 4 * sum(sizes) / 4 == row.bytes_per_step  # float32, and a round of four steps
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", texts[0])


def test_mistakes_are_named(config):
    dataset = data.load(config)
    config.local.mode = "threads"
    with pytest.raises(UserError, match=r"mode must be vmap or shard_map, got 'threads'"):
        diloco.run(config, dataset, 4, 0.3)
    config.local.update(mode="shard_map", workers=16)
    with pytest.raises(UserError, match=rf"more than the {jax.device_count()} devices; on CPU"):
        diloco.run(config, dataset, 4, 0.3)
    config.local.update(mode="vmap", workers=3)
    with pytest.raises(UserError, match=r"batch_size=16 must be a multiple of config\.local\.w"):
        diloco.run(config, dataset, 4, 0.3)
    config.local.update(workers=8, every=(3, 4))
    with pytest.raises(UserError, match=r"must divide the largest"):
        diloco.run(config, dataset, 4, 0.3)
