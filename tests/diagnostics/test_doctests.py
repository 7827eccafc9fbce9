"""The examples in the docstrings give the numbers that they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from depthscope import diagnostics

ROOMS = ("schema", "kernels", "quantities", "metrics", "experiments", "analysis", "verdicts")
MODULES = [
    module.name
    for room in ROOMS
    for module in pkgutil.walk_packages(
        importlib.import_module(f"{diagnostics.__name__}.{room}").__path__, f"{diagnostics.__name__}.{room}."
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
