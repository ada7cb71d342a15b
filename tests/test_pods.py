"""Training steps on pods, compiled for chips that are not here, send what the formulas say.

Compiling needs ``pip install -e '.[chips]'`` and is skipped where that is missing.
"""

import json

import pytest

from benchmarks import chips, pods

ROWS = json.loads(pods.RESULTS.read_text())["rows"]


def test_the_models_have_the_parameters_in_their_names():
    for name, model in pods.MODELS.items():
        number, unit = name.split()
        expected = float(number) * {"M": 1e6, "B": 1e9}[unit]
        assert pods.parameters(model.shapes()) == pytest.approx(expected, rel=0.06)


@pytest.mark.slow
def test_data_parallel_on_v5e_sends_what_the_formula_says():
    try:
        chips.devices("v5e")
    except RuntimeError as error:
        pytest.skip(str(error))
    model, pod = pods.MODELS["125 M"], pods.PODS["v5e-64"]
    row = pods.measure(model, pod, "data parallel")
    assert row["fits"]
    assert row["arguments"] == pytest.approx(8 * pods.parameters(model.shapes()), rel=0.01)
    assert set(row["sent"]) == {"all-reduce"}
    assert row["sent"]["all-reduce"] == pytest.approx(row["formula"], rel=0.01)
