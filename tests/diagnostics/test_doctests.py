"""The examples in the docstrings give the numbers that they show, and every public kernel has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
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


def test_every_public_kernel_has_an_example_and_sections():
    for name in diagnostics.kernels.__all__:
        module = importlib.import_module(f"{diagnostics.__name__}.kernels.{name}")
        functions = inspect.getmembers(module, inspect.isfunction)
        # Of this package, wherever in it they are written.
        public = [(key, value) for key, value in functions if value.__module__.startswith(module.__name__)]
        found = {key: value.__doc__ or "" for key, value in public if not key.startswith("_")}
        assert found
        assert [key for key, doc in found.items() if ">>>" not in doc or "Parameters\n" not in doc] == []
