"""How are equations shown? As MathML, which browsers draw and screen readers speak without a script or a font."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    equation = convert(node.astext(), display="block")
    # A label makes it a target of links; wide equations scroll in their own box.
    identifiers = "".join(f' id="{name}"' for name in node["ids"][:1])
    translator.body.append(f'<div class="equation" tabindex="0"{identifiers}>{equation}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Offer the renderer as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
