"""How do pages that are written for GitHub become pages of the site? Their links, equations and diagrams are rewritten."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
# Files outside of docs/ that have a page of the site.
PAGES = {
    "README.md": "index.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)")
_INCLUDED = re.compile(r"```\{include\} (?P<name>\S+)\n```")
_INLINE_MATH = re.compile(r"\$`(.+?)`\$")
# What a line of a Mermaid diagram says: a box with its text, or the beginning of a group of boxes.
_GROUP = re.compile(r'\s*subgraph \w+\["(?P<title>[^"]+)"\]')
_BOX = re.compile(r'\b\w+(?:\["(?P<box>[^"]+)"\]|\(\[(?P<end>[^\]]+)\]\)|\[\("?(?P<store>[^")]+)"?\)\])')


def site_source(text: str, page: Path) -> str:
    """The text of a page with links that lead to pages of the site, and equations and diagrams that Sphinx draws.

    ``text``: markdown.
    ``page``: the file of ``docs/`` that it is shown at.
    """
    folder = page.parent
    included = _INCLUDED.search(text)
    if included:
        source = folder / included["name"]
        folder = source.parent
        text = _INCLUDED.sub(lambda _: source.read_text(encoding="utf-8"), text)
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    # Odd parts are fenced blocks, whose links are code.
    for index, part in enumerate(parts):
        if index % 2 == 0:
            part = _LINK.sub(lambda link: _link(link, folder, page.parent), part)
            parts[index] = _INLINE_MATH.sub(r"{math}`\1`", part)
        elif part.startswith("```mermaid"):
            parts[index] = diagram(part)
    return "".join(parts)


def _link(link: re.Match[str], folder: Path, shown_in: Path) -> str:
    target, _, anchor = link["target"].partition("#")
    if not target or ":" in target:
        return link[0]
    path = (folder / target).resolve()
    if path.parent == ROOT and path.name in PAGES:
        path = DOCS / PAGES[path.name]
    if not path.is_relative_to(DOCS):
        return link["text"]  # a file of the code: the site has no page for it
    relative = os.path.relpath(path, shown_in.resolve())
    return f"[{link['text']}]({relative}{'#' + anchor if anchor else ''})"


def diagram(mermaid: str) -> str:
    """The boxes of a Mermaid diagram as nested boxes of HTML: its arrows need a script of megabytes.

    ``mermaid``: the fenced block.
    Returns: Raw HTML for MyST.
    """
    lines = ['<div class="rooms" role="group" aria-label="The rooms of the code, in the order of the data">']
    seen = set()
    for line in mermaid.splitlines():
        group = _GROUP.match(line)
        if group:
            lines.append(f'<section class="room"><strong>{group["title"]}</strong>')
            continue
        if line.strip() == "end":
            lines.append("</section>")
        for found in _BOX.finditer(line):
            text = found["box"] or found["end"] or found["store"]
            if text not in seen:
                seen.add(text)
                title, _, rest = text.partition("<br/>")
                lines.append(f'<div class="box"><b>{title}</b> {rest}</div>')
    return "\n".join(["```{raw} html", *lines, "</div>", "```"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Rewrite each page before it is parsed."""

    def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
        path = Path(app.env.doc2path(docname))
        source[0] = site_source(source[0], path)

    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
