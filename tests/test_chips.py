"""What steps move on a TPU v5e and an H100, by the compilers for them, on a machine with neither.

They need ``pip install -e '.[chips]'`` and are skipped where that is missing. The tree is one leaf
of 134 million elements, larger than the memory on the chips; see ``benchmarks/chips.py``.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import nag_jax
from benchmarks import chips

pytestmark = pytest.mark.slow
every_chip = pytest.mark.parametrize("chip", list(chips.CHIPS))
CASES = chips.cases()
RESTARTS = [name for name in CASES if "restart" in name]
ROUNDED = [name for name in CASES if "stochastic" in name]
INNER = [name for name in CASES if "inner step" in name]
EXACT = [
    name
    for name in CASES
    if name.startswith(("nag", "rules.", "fista", "tmm", "pogm", "optista"))
    and name not in (*RESTARTS, *ROUNDED, "nag, int8_blocks", "nag_auto")
]


@functools.cache
def measured(name, chip, shapes=tuple(chips.TREES["one leaf of 134 M"])):
    try:
        chips.devices(chip)
        chips.options(chip)
    except RuntimeError as error:
        pytest.skip(str(error))
    return chips.measure(CASES[name], chip, list(shapes))


def test_every_kind_of_step_is_tested():
    assert len(EXACT) > 25
    assert len(RESTARTS) == 4
    assert len(ROUNDED) == 2
    assert len(INNER) >= 4


@every_chip
@pytest.mark.parametrize("name", EXACT)
def test_rules_and_recipes_move_the_least(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.001 * CASES[name].least
    assert program.temporaries < 0.01
    assert program.copies == 0


@every_chip
@pytest.mark.parametrize("name", [*RESTARTS, *ROUNDED, "averaged(nag)"])
def test_restarts_averages_and_rounding_move_the_least(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.01 * CASES[name].least
    assert program.temporaries < 0.01


@every_chip
def test_int8_buffers_are_read_twice_and_written_once(chip):
    program = measured("nag, int8_blocks", chip)
    assert program.moved <= 1.05 * CASES["nag, int8_blocks"].least
    assert program.temporaries < 0.1


@every_chip
def test_int8_costs_nothing_where_leaves_are_small(chip):
    shapes = ((64, 64),) * 50
    program, unit = (measured(name, chip, shapes) for name in ("nag, int8_blocks", "nag"))
    assert program.moved <= 1.02 * unit.moved


@every_chip
@pytest.mark.parametrize(
    "shape", [(50257, 2816), (32768, 1000), (12288, 128, 64), (3, 3, 1024, 8192)]
)
def test_int8_buffers_of_any_shape_are_not_copied(shape, chip):
    """Whatever layout XLA chooses: odd lengths, a last axis that is not a multiple of a tile."""
    program = measured("nag, int8_blocks", chip, (shape,))
    assert program.temporaries < 0.2
    # On a TPU the int8 numbers of the smaller leaves pass through the memory on the chip, and XLA
    # counts them twice.
    twice = 7 if chip == "v5e" and math.prod(shape) < 2**27 else 0
    assert program.moved <= 19.75 + twice


@every_chip
@pytest.mark.parametrize("name", INNER)
def test_a_step_of_outer_without_sync_moves_what_the_inner_optimizer_moves(name, chip):
    program = measured(name, chip)
    assert program.moved <= 1.001 * CASES[name].least
    assert program.copies == 0


@every_chip
@pytest.mark.parametrize(("inner", "least"), [("sgd", 12), ("adam", 28), ("nag", 20)])
def test_a_step_of_outer_that_does_not_meet_reads_the_slow_copy_at_most(inner, least, chip):
    """Besides what the inner optimizer moves; whether it meets is known only when it runs."""
    measured("nag", chip)
    if chip == "h100" and jax.__version_info__ < (0, 12):
        pytest.skip("the XLA of jax 0.10 copies on a GPU whatever passes through a branch")
    make = {"sgd": optax.sgd, "adam": optax.adam, "nag": nag_jax.nag}[inner]
    params = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in chips.TREES["one leaf of 134 M"]
    ]
    compiled = chips.compile_step(chip, nag_jax.snoo(make(0.1)), params)
    parameters = sum(p.size for p in params)
    assert chips.moved_without_branch(compiled, parameters) <= 1.001 * (least + 4)
    program = chips.read(compiled, parameters)
    assert program.copies == 0
    assert program.temporaries < 0.01


@every_chip
@pytest.mark.parametrize(("name", "most"), [("adanag", 36), ("nag_auto", 44), ("backtracking", 44)])
def test_automatic_step_sizes(name, most, chip):
    """What they need at least is in ``benchmarks/chips.py``; the last two move more."""
    program = measured(name, chip)
    assert program.moved <= 1.001 * most
    assert program.temporaries < 0.01
    assert program.copies == 0
