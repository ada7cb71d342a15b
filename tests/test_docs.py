"""Every example in a docstring and every Python block of a page runs; pages and files agree."""

import ast
import doctest
import importlib
import itertools
import pkgutil
import re
from pathlib import Path
from types import FunctionType

import jax
import jax.numpy as jnp
import optax
import pytest

import nag_jax

MODULES = [m.name for m in pkgutil.walk_packages(nag_jax.__path__, "nag_jax.")]
MODULES_OF_USERS = (
    nag_jax, nag_jax.gaps, nag_jax.rules, nag_jax.schedules, nag_jax.restart, nag_jax.proximal,
)  # fmt: skip
NAMES = dict(jax=jax, jnp=jnp, optax=optax, nag_jax=nag_jax, rules=nag_jax.rules)
ROOT = Path(__file__).parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/README.md")]),
)
OPTIONAL = {"jaxopt", "torch"}  # libraries that pages compare with; no other may be missing


def programs(page):
    """Its Python blocks; one without an import continues the one before it."""
    text, found = page.read_text(), []
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        # As many lines as there are before it, so that a traceback names the line of the page.
        block = "\n" * (text.count("\n", 0, match.start()) + 1) + match[1]
        if found and not re.search(r"^(import|from) ", block, flags=re.MULTILINE):
            found[-1].append(block)
        else:
            found.append([block])
    return found


SLOW = {"jaxopt.md", "methods.md", "tutorial.md"}
PROGRAMS = [
    pytest.param(
        page,
        blocks,
        id=f"{page.relative_to(ROOT)}-{number}",
        marks=[pytest.mark.slow] * (page.name in SLOW),
    )
    for page in PAGES
    for number, blocks in enumerate(programs(page))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=NAMES, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in nag_jax.__all__ if callable(getattr(nag_jax, n))])
def test_public_functions_are_documented(name):
    documentation = getattr(nag_jax, name).__doc__
    assert documentation
    plain_data = isinstance(getattr(nag_jax, name), type)
    assert plain_data or ">>>" in documentation or "Raises:" in documentation


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained")
@pytest.mark.parametrize(("page", "blocks"), PROGRAMS)
def test_blocks_of_the_pages_run(page, blocks):
    imported = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks), flags=re.MULTILINE))
    for name in sorted(imported & OPTIONAL):
        pytest.importorskip(name)
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_run_of_the_methods_page_evaluates_any_optimizer():
    page = ROOT / "docs" / "methods.md"
    names = {}
    exec(compile(programs(page)[0][0], page, "exec"), names)
    start = jnp.array([-1.2, 1.0])
    run = lambda optimizer, steps: names["run"](jnp.sum, optimizer, start, steps)
    # The slow copy, until the first outer step; params are elsewhere by then.
    assert jnp.array_equal(run(nag_jax.lookahead(optax.adam(0.02)), 4), start)
    assert jnp.array_equal(run(nag_jax.snoo(nag_jax.nag(0.1), every=5), 4), start)
    assert jnp.allclose(run(nag_jax.snoo(nag_jax.nag(0.1), 1.0, 0.0, every=1), 1), start - 0.19)
    assert jnp.allclose(run(nag_jax.nag(0.1), 1), start - 0.1)
    assert jnp.allclose(run(optax.sgd(0.1), 1), start - 0.1)


def public(module):
    """The functions and classes that a module defines or re-exports (``X as X``)."""
    names = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.name == alias.asname}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    kinds = FunctionType | type
    return {n for n in names if n[0] != "_" and isinstance(getattr(module, n), kinds)}


def test_the_changelog_names_everything_public():
    text = (ROOT / "CHANGELOG.md").read_text()
    code = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text))))
    assert not {name for module in MODULES_OF_USERS for name in public(module)} - code


def test_the_api_reference_has_every_public_name_once():
    documented = []
    for page in sorted(ROOT.glob("docs/api/*.rst")):
        module = "nag_jax"
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE):
            if kind in ("automodule", "currentmodule"):
                module = name
            elif kind in ("autofunction", "autoclass"):
                documented.append(f"{module}.{name}")
    expected = [f"{m.__name__}.{name}" for m in MODULES_OF_USERS for name in public(m)]
    assert len(expected) > 70
    assert sorted(documented) == sorted(expected)


def test_links_between_the_pages_lead_somewhere():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text())
    ]
    assert len(links) > 30
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_block_without_imports_continues_the_one_before():
    tutorial = next(page for page in PAGES if page.name == "tutorial.md")
    assert [len(blocks) for blocks in programs(tutorial)] == [
        tutorial.read_text().count("```python")
    ]
    lines = [len(block.splitlines()) for block in programs(tutorial)[0]]
    assert all(a < b for a, b in itertools.pairwise(lines))


def test_every_reference_implementation_is_shown_once():
    shown = re.findall(
        r"^:pyobject: (\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE
    )
    tree = ast.parse((ROOT / "tests/reference.py").read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert sorted(shown) == sorted(defined)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_versions_agree():
    read = lambda name: (ROOT / name).read_text()
    pins = dict(re.findall(r'"(ruff|pyright)==([\d.]+)"', read("pyproject.toml")))
    assert set(pins) == {"ruff", "pyright"}
    hook = re.search(r"ruff-pre-commit\s+rev: v([\d.]+)", read(".pre-commit-config.yaml"))[1]
    assert hook == pins["ruff"]
    citation = re.search(r"^version: ([\w.]+)$", read("CITATION.cff"), re.MULTILINE)[1]
    bibtex = re.search(r"version = {([\w.]+)}", read("docs/index.md"))[1]
    released = re.findall(r"^## \[?(\d[\w.]*)", read("CHANGELOG.md"), re.MULTILINE)
    assert citation == bibtex == released[0]
