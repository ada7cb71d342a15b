"""Every example in a docstring and every Python block of a page runs and says the truth."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import nag_jax

MODULES = [m.name for m in pkgutil.iter_modules(nag_jax.__path__, "nag_jax.")]
NAMES = dict(jax=jax, jnp=jnp, optax=optax, nag_jax=nag_jax, rules=nag_jax.rules)
ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=NAMES, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in vars(nag_jax) if callable(getattr(nag_jax, n))])
def test_public_functions_are_documented(name):
    documentation = getattr(nag_jax, name).__doc__
    assert documentation
    plain_data = isinstance(getattr(nag_jax, name), type)
    assert plain_data or ">>>" in documentation or "Raises:" in documentation


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_the_pages_run(block):
    exec(compile(block, "<block>", "exec"), {})
