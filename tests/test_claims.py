"""The conclusions of the pages agree with the result files, and measured numbers are in tables."""

import re

import pytest

from benchmarks import claims
from benchmarks.readme import span

CONCLUSIONS = [
    pytest.param(page, phrase, holds, id=f"{page.parent.name}/{page.name}: {phrase}")
    for page, phrases in claims.CONCLUSIONS
    for phrase, holds in phrases().items()
]
MEASURED = (claims.PAGE, claims.DOCS / "does_it_help.md")
# Not measurements: definitions of the targets, limits of the theory, and settings.
GIVEN = ("95 %", "2/L", "4/(3L)", "4/L", "1/L", "1e-3 / 1e-6 / 1e-9", "1e-6 / 1e-9", "ZeRO-1")


def prose(page):
    """The text without tables, programs, code and links, in one line."""
    text = page.read_text()
    for name in re.findall(r"<!-- /(.*?) -->", text):
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\s+", " ", text)


def test_there_are_conclusions():
    assert len(CONCLUSIONS) > 40


@pytest.mark.parametrize(("page", "phrase", "holds"), CONCLUSIONS)
def test_a_conclusion_is_on_its_page_and_the_results_agree(page, phrase, holds):
    assert phrase in prose(page)
    assert holds


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.name)
def test_measured_numbers_are_in_tables(page):
    text = prose(page)
    conclusions = (p for other, phrases in claims.CONCLUSIONS if other == page for p in phrases())
    for phrase in sorted([*conclusions, *GIVEN], key=len, reverse=True):
        text = text.replace(phrase, "|")
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "|", text)
    assert not re.findall(r"[^|]{0,40}\b[0-9][^|]{0,40}", text)


def test_span():
    assert span([1.26, 2.04, 1.51]) == "1.3 to 2.0"
    assert span([0.14, 0.1], 1) == "0.1"
