"""The numbers in the sentences of the pages are those of the committed result files."""

import re

import pytest

from benchmarks import claims
from benchmarks.readme import if_true, joined, span

SECTIONS = [
    pytest.param(section, id=f"{section.page.parent.name}/{section.page.name} {section.heading}")
    for section in claims.SECTIONS
]


def prose(section):
    """Its text, without what is generated, programs and links, in one line."""
    text = section.page.read_text()
    for name in re.findall(r"<!-- /(.*?) -->", text):
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    if section.heading:
        rank = section.heading.partition(" ")[0]
        _, text = text.split(f"{section.heading}\n")
        text = re.split(rf"^#{{1,{len(rank)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_results_say_what_the_pages_say(section):
    text = prose(section)
    missing = [phrase for phrase in section.phrases() if phrase not in text]
    assert not missing


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.values[0].whole])
def test_no_number_is_there_that_the_results_do_not_say(section):
    text = prose(section)
    for phrase in sorted(section.phrases(), key=len, reverse=True):
        text = text.replace(phrase, "|")
    assert not re.findall(r"[^|]{0,40}\b[0-9][^|]{0,40}", text)


def test_every_section_of_the_benchmarks_is_looked_at():
    headings = re.findall(r"^## .*$", claims.PAGE.read_text(), flags=re.MULTILINE)
    found = {section.heading for section in claims.SECTIONS if section.page == claims.PAGE}
    assert {*headings} == found


def test_phrases():
    assert span([1.26, 2.04, 1.51]) == "1.3 to 2.0"
    assert span([0.14, 0.1], 1) == "0.1"
    assert joined([0.9, 0.99]) == "0.9 and 0.99"
    assert joined([1, 2.04, 3], 1) == "1.0, 2.0 and 3.0"
    assert if_true(1 > 2, "more") not in "more or less"
