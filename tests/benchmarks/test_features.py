"""The table of what peers have: names that are there, in the packages that are installed."""

from __future__ import annotations

import pytest

from benchmarks.capture.features import FEATURES, page, resolved, version_of
from benchmarks.capture.statements import statements
from benchmarks.capture.tools import TOOLS

PATHS = sorted({path for paths in FEATURES.values() for path in paths})


@pytest.mark.parametrize("path", PATHS)
def test_every_name_is_in_its_package(path: str):
    if version_of(path) is None:
        pytest.skip(f"needs {path.partition('.')[0]}")
    assert resolved(path)


def test_a_name_that_is_not_there_is_found_out():
    assert not resolved("depthscope.no_such_verb")
    assert not resolved("no_such_package.verb")


def test_the_table_has_every_feature():
    text = page()
    assert all(what in text for what in FEATURES)
    assert "`interventions.patch`" in text


def test_statements_of_a_user_are_those_without_the_benchmark():
    assert statements("plain") == 0
    assert statements("probes.capture") == 1
    assert statements("hooks, references kept") == statements("hooks, clones")
    assert all(
        statements(name) >= 3 for name in TOOLS if name in ("nnsight", "captum", "pyvene", "torchlens")
    )
