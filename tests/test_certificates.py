"""The documented bounds hold in the exact worst case, and a wrong coefficient breaks them."""

import json

import pytest

from benchmarks import certificates
from benchmarks.certificates import CLAIMS, Q, exact

NEEDS = "needs PEPit: pip install -e '.[certificates]'"
examples = "PEPit.examples"
composite = pytest.importorskip(f"{examples}.composite_convex_minimization", reason=NEEDS)
unconstrained = pytest.importorskip(f"{examples}.unconstrained_convex_minimization", reason=NEEDS)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]
every_claim = pytest.mark.parametrize(
    "claim", CLAIMS, ids=lambda claim: f"{claim.method} ({claim.functions})"
)
ACCURACY = 1e-5  # of the solver, relative


@every_claim
def test_the_exact_worst_case_is_within_the_bound(claim):
    steps = [n for n in (1, 2, 5) if n <= claim.most] + [10] * (not claim.composite)
    ratios = [exact(claim, n) / claim.value(n) for n in steps if n <= claim.most]
    if claim.attained:
        assert ratios == pytest.approx([1.0] * len(ratios), rel=ACCURACY)
    else:
        assert 0 < max(ratios) < 1


@every_claim
def test_a_wrong_coefficient_breaks_the_bound(claim):
    n = claim.wrong_steps
    assert exact(claim, n, claim.wrong) > 1.005 * claim.value(n)


def same_as(example, **arguments):
    """What the method as PEPit's authors wrote it has as its worst case."""
    return pytest.approx(example(L=1, verbose=-1, solver="CLARABEL", **arguments)[0], rel=ACCURACY)


def of(method, functions):
    return next(c for c in CLAIMS if (c.method, c.functions) == (method, functions))


@pytest.mark.filterwarnings("ignore")
def test_the_worst_cases_are_those_of_independent_code():
    """Where a bound is not attained, a mistake could hide below it."""
    fista = of("`fista(1/L, prox)`", certificates.PENALTY)
    assert exact(fista, 4) == same_as(composite.wc_accelerated_proximal_gradient, mu=0, n=4)
    strong = of("`rules.strongly_convex(q)`", certificates.STRONG)
    example = unconstrained.wc_accelerated_gradient_strongly_convex
    assert exact(strong, 4) == same_as(example, mu=Q, n=4)


def test_the_result_file_is_up_to_date():
    """What the page prints is what the code gives now."""
    rows = json.loads(certificates.RESULTS.read_text())["rows"]
    named = [(row["method"], row["functions"], row["bound"]) for row in rows]
    assert named == [(claim.method, claim.functions, claim.bound) for claim in CLAIMS]
    for claim, row in zip(CLAIMS, rows, strict=True):
        assert row["exact"][1] == pytest.approx(exact(claim, 2), rel=ACCURACY)
