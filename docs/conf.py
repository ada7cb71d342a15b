"""The documentation: ``python -m sphinx -W --keep-going -b html docs site``."""

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
autodoc_typehints = "none"  # shapes, units and ranges stand in Args
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


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers draw themselves: pages load nothing from elsewhere."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
