"""Do the pages about the house name what is there?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "docs/architecture.md")
FOLDERS = "probes|diagnostics|app|tests|benchmarks|docs|depthscope"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"<!-- new file: .*", "", text)  # an example's own file
    named = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.*]*\w(?:/|\.\w+)?", text))
    assert named
    missing = sorted(path for path in named if not any(ROOT.glob(path.rstrip("/"))))
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_between_pages_leads_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (folder / link).exists()] == []


def test_every_room_is_in_the_picture():
    picture = (
        (ROOT / "docs/architecture.md")
        .read_text(encoding="utf-8")
        .partition("```mermaid")[2]
        .partition("```")[0]
    )
    rooms = [
        folder.name
        for package in ("probes", "diagnostics", "app")
        for folder in sorted((ROOT / package).iterdir())
        if (folder / "__init__.py").exists()
    ]
    assert len(rooms) > 20
    assert [room for room in rooms if not re.search(rf"\b{room}\b", picture)] == []
