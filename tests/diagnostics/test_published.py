"""The benchmark of published numbers runs, finds them, and tells a miss."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published.py"


@pytest.fixture(scope="module")
def published():
    specification = importlib.util.spec_from_file_location("published", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["published"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["published"]


def test_every_published_number_is_found(published, capsys):
    assert published.main([]) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert published.main(["--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert set(tables) == {result.__name__ for result in published.RESULTS}
    assert all(row["holds"] for rows in tables.values() for row in rows)


def test_a_miss_is_told(published, capsys, monkeypatch):
    def wrong():
        """A number that is not."""
        yield published.Row("two and two", 5.0, 4.0, 0.5)

    monkeypatch.setattr(published, "RESULTS", (wrong,))
    assert published.main([]) == 1
    assert "MISSED (tolerance 0.5)" in capsys.readouterr().out
