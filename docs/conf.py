"""The documentation: ``python -m sphinx -W --keep-going -b html docs site``."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import unichar2tex
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import nag_jax

project = "nag_jax"
author = "the nag_jax authors"
release = version = nag_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
nitpicky = True

myst_heading_anchors = 3
napoleon_numpy_docstring = False
autodoc_typehints = "none"  # Args has shapes, units and ranges
autodoc_preserve_defaults = True
add_module_names = False

html_theme = "furo"
html_title = f"nag_jax {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f"<div>{_mathml(node, block=True)}</div>\n")
    raise nodes.SkipNode


def _mathml(node: nodes.Element, *, block: bool) -> str:
    tex = node.astext().translate(unichar2tex.uni2tex_table)
    return str(tex2mathml(tex, as_block=block))


def _references() -> dict[str, list[str]]:
    """The labels of the sections of reference.md that each function is named in."""
    sections = re.split(r"^\((reference-.*)\)=$", _PAGE.read_text(), flags=re.MULTILINE)[1:]
    found: dict[str, list[str]] = {}
    for label, text in zip(sections[::2], sections[1::2], strict=True):
        for name in re.findall(r"{py:func}`(.*?)`", text):
            found.setdefault(name, []).append(label)
    return found


def _link_reference(app: Any, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """Adds to a docstring a link to the reference implementation."""
    labels = _REFERENCES.get(name, [])
    if labels:
        links = ", ".join(f":ref:`{label}`" for label in labels)
        lines.extend(["", ".. rubric:: Reference implementation", "", links, ""])


_PAGE = Path(__file__).parent / "reference.md"
_REFERENCES = _references()


def setup(app: Sphinx) -> None:
    # MathML, which browsers render themselves, so that pages load nothing from elsewhere.
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _link_reference, priority=900)  # after napoleon
