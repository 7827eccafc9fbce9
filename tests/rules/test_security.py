"""Is every promise of SECURITY.md held by a test that exists?"""

from __future__ import annotations

import ast
import importlib.util
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


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_audit_that_asked_nothing_says_so(audit):
    lines, code = audit.report({"dependencies": [{"name": "zarr", "skip_reason": "not found"}]})
    assert code == audit.NO_DATA == 3
    assert lines[0].startswith("AUDIT WITHOUT DATA")
    assert lines[1:] == ["audited 0 of 1 packages"]


def test_a_known_vulnerability_fails_unless_it_is_allowed(audit, monkeypatch):
    found = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
    document = {"dependencies": [{"name": "zarr", "version": "1.0", "vulns": [found]}]}
    assert audit.report(document)[1] == 1
    monkeypatch.setitem(audit.ALLOWED, "CVE-1", ("of a part that we do not use", "2026-11-25"))
    lines, code = audit.report(document)
    assert code == 0
    assert "a part that we do not use" in lines[-1]
