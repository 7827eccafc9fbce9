"""The picture of docs/architecture.md: every arrow is an import, and every import between rooms follows the arrows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = (
    (ROOT / "docs" / "architecture.md")
    .read_text(encoding="utf-8")
    .partition("```mermaid")[2]
    .partition("```")[0]
)


def picture(package: str) -> tuple[dict[str, set[str]], set[tuple[str, str]]]:
    """The rooms of each node, and the arrows between nodes, in the box of a package."""
    box = PICTURE.partition(f'subgraph {package}["')[2].partition("    end\n")[0]
    labels = dict(re.findall(r'(\w+)\["([^"<]+)', box))
    rooms = {node: set(re.split(r"[,·]\s*", label.replace(" ", ""))) for node, label in labels.items()}
    arrows = set(re.findall(r'^\s*(\w+)(?:\["[^"]*"\])? --> (\w+)', box, re.MULTILINE))
    return {node: rooms.get(node, {node}) for node in {*rooms, *sum(arrows, ())}}, arrows


def imports(package: str) -> set[tuple[str, str]]:
    """Which room imports which; annotations run nothing and do not count."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        annotations = {
            each
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for each in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in annotations:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                parts = [name.split(".") for name in names]
                found |= {(room, part[2]) for part in parts if part[:2] == ["depthscope", package]}
    return {(one, other) for one, other in found if one != other}


@pytest.mark.parametrize("package", ["probes", "diagnostics", "app"])
def test_the_picture_is_that_of_the_imports(package):
    rooms, arrows = picture(package)
    node_of = {room: node for node, names in rooms.items() for room in names}
    between = {(node_of[a], node_of[b]) for a, b in imports(package) if a in node_of and b in node_of}
    assert len(arrows) > 5
    assert set(node_of) <= {path.stem for path in (ROOT / package).iterdir()}
    drawn_only = arrows - between
    assert not drawn_only, (
        f"no import is behind {sorted(drawn_only)}: take the arrow out of docs/architecture.md"
    )
    reached = set(arrows)
    while further := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= further
    missing = {(a, b) for a, b in between if a != b} - reached
    assert not missing, (
        f"{sorted(missing)} are imports that the arrows of docs/architecture.md do not lead to"
    )
    assert all((node, node) not in reached for node in rooms)
