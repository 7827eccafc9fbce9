"""Is every promise of SECURITY.md held by a test that exists?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize(("file", "name"), TESTS, ids=lambda value: Path(value).stem)
def test_every_test_that_the_page_names_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test():
    promises = (
        PAGE.partition("## What is promised")[2].partition("## What is not promised")[0].split("\n- **")[1:]
    )
    assert promises
    assert [promise[:60] for promise in promises if "`tests/" not in promise] == []
