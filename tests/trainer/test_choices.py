"""What a config chooses: any value works or is refused, and the log says what was used."""

import json
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from examples.trainer.errors import UserError
from examples.trainer.loop import stopping
from examples.trainer.optimizer import make_optimizer
from examples.trainer.options.fields import flatten
from examples.trainer.options.values import check_config
from examples.trainer.run import board, workdir
from examples.trainer.run.state import TrainState
from trainer.helpers import OPTIMIZERS, change, config

FIELDS = sorted(flatten(config().to_dict()).items())
WORDS = ["", "nag", "constant", "cosine", "sutskever", "decoupled", "skip", "refuse", *OPTIMIZERS]


def values_like(value):
    """Of the type that the field has, which is what ml_collections lets through."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(-3, 3) | st.integers(-(2**70), 2**70)
    if isinstance(value, float) or value is None:
        # Not those so large that warm-up of a learning rate overflows.
        return st.floats(-1e30, 1e30) | st.sampled_from([np.nan, np.inf, -np.inf])
    if isinstance(value, str):
        return st.sampled_from(WORDS) | st.text(max_size=8)
    return st.lists(st.integers(-3, 300) | st.text(max_size=2), max_size=4).map(tuple)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_works_or_is_a_user_error(data):
    chosen = config()
    names = st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique_by=lambda f: f[0])
    for name, usual in data.draw(names):
        change(chosen, name, data.draw(values_like(usual), label=name))
    try:
        check_config(chosen)
        maker = make_optimizer(chosen, 11, 330)
        state = maker.transformation.init({"w": jnp.ones(2)})
        row = maker.hyperparameters(state, 5, 1.0)
    except UserError as error:
        assert "config" in str(error)  # noqa: PT017
    else:
        assert all(np.isfinite(value) for value in row.values())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_any_saved_config_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"another config|config\.json: damaged"):
        workdir.claim(folder, config())
    assert (folder / "config.json").read_bytes() == content


@pytest.mark.parametrize("transition_steps", [0, 4])
def test_the_log_has_what_nag_then_sgd_uses(transition_steps):
    """Exact NAG at the rates and momenta of the log gives its params, across the switch."""
    chosen = config(learning_rate=0.1, momentum=0.8)
    changes = dict(name="nag_then_sgd", switch_step=6, transition_steps=transition_steps)
    chosen.optimizer.update(changes)
    maker = make_optimizer(chosen, 11, 22)
    y = x = 1.0
    params = {"w": jnp.ones(2)}
    state = maker.transformation.init(params)
    for step in range(10):
        row = maker.hyperparameters(state, step, 1.0)
        updates, state = maker.transformation.update(params, state, params)
        params = {"w": params["w"] + updates["w"]}
        new = y - row["learning_rate"] * y
        following = maker.hyperparameters(state, step + 1, 1.0)["momentum"]
        y, x = new + following * (new - x), new
        np.testing.assert_allclose(params["w"], y, rtol=1e-5)
    assert row == pytest.approx({"learning_rate": 0.5, "momentum": 0.0})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_log_has_momentum_where_the_config_sets_it(name):
    """Another value of config.momentum changes the second update, or is not in the log."""
    seconds = []
    for momentum in (0.9, 0.5):
        chosen = config(momentum=momentum, schedule="constant", warmup_epochs=0.0)
        chosen.optimizer.update(name=name)
        maker = make_optimizer(chosen, 11, 22)
        params = {"w": jnp.ones(2)}
        state = maker.transformation.init(params)
        for gradient in (1.0, 3.0):
            gradients = {"w": jnp.full(2, gradient)}
            updates, state = maker.transformation.update(gradients, state, params)
            params = {"w": params["w"] + updates["w"]}
        seconds.append((params, maker.hyperparameters(state, 1, 1.0)))
    (one, row), (other, _) = seconds
    assert ("momentum" in row) == (not np.allclose(one["w"], other["w"]))


def test_a_plateau_lowers_the_rate_of_both_players():
    chosen = config("gan", clip_norm=100.0, warmup_epochs=0.0)
    chosen.plateau.patience = 1
    maker = make_optimizer(chosen, 11, 22)
    params = {"generator": jnp.ones(2), "discriminator": jnp.ones(3)}
    state = TrainState(*[None] * 7)._replace(opt_state=maker.transformation.init(params))
    steps = [
        maker.transformation.update(params, stopping.with_scale(chosen, state, scale).opt_state)[0]
        for scale in (1.0, 0.1)
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda u: 0.1 * u, steps[0]), steps[1], rtol=1e-5)


def test_both_players_of_a_gan_have_the_rates_they_found():
    chosen = config("gan")
    chosen.optimizer.name = "nag_auto"
    maker = make_optimizer(chosen, 11, 22)
    params = {"generator": jnp.ones(2), "discriminator": jnp.ones(3)}
    state = maker.transformation.init(params)
    gradients = {"generator": jnp.ones(2), "discriminator": 7.0 * jnp.ones(3)}
    _, state = maker.transformation.update(gradients, state, params)
    row = maker.hyperparameters(state, 0, 1.0)
    rates = [f"{player}_learning_rate" for player in ("generator", "discriminator")]
    assert row.keys() == {*rates, "momentum"}
    assert 0 < row[rates[1]] < row[rates[0]]


def events_in(path):
    """The records of a file of events; their checksums are not looked at."""
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_events_have_every_scalar_at_its_step(tmp_path):
    """TensorBoard hides what an earlier file has from the step of ``START`` on."""
    events = board.Board(tmp_path, 40)
    events.write({"train_loss": 0.5, "learning_rate": 0.25}, 50)
    (path,) = tmp_path.iterdir()
    first, start, *scalars = events_in(path)  # written already, before it is closed
    assert first.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (41, SessionLog.START)
    found = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in scalars]
    assert found == [(50, "train_loss", 0.5), (50, "learning_rate", 0.25)]
    assert all(event.wall_time > 1e9 for event in scalars)
    events.close()
