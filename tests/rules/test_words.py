"""Do the faces speak plain English? No word of a private dialect is in any text that they print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from depthscope.app.text.glossary import GLOSSARY
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.verdicts import VERDICTS

APP = Path(__file__).resolve().parents[2] / "app"
DIALECT = re.compile(
    r"\b(told|stands|beside|kept whole|put next to|it is one a|is said of|of one(?=[.,;:!?]|$))\b",
    re.IGNORECASE,
)


def printed(path: Path) -> Iterator[str]:
    """Every text of a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [
        node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    # Also below the name that it documents.
    docs = {id(each.value) for body in bodies for each in body if isinstance(each, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_no_text_of_a_face_is_in_a_private_dialect():
    texts = [(str(path.relative_to(APP)), text) for path in APP.rglob("*.py") for text in printed(path)]
    texts += [(path.name, re.sub(r"//.*|\{#.*?#\}", "", path.read_text())) for path in APP.rglob("*.js*")]
    texts += [(path.name, path.read_text()) for path in APP.rglob("*.jinja")]
    texts += [(name, text) for name, each in VERDICTS.items() for text in (each.title, each.advice)]
    texts += [(name, text) for name, each in CATALOGUE.items() for text in (each.title, each.label)]
    texts += [(term, entry.meaning) for term, entry in GLOSSARY.items()]
    assert len(texts) > 1000
    found = [
        f"{where}: {match[0]!r} in {text[:100]!r}" for where, text in texts if (match := DIALECT.search(text))
    ]
    assert not found, "\n".join(found)
