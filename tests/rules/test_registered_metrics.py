"""Every metric that a module of `diagnostics/metrics` declares is in CATALOGUE, and reachable by its name."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import depthscope
from depthscope import diagnostics
from depthscope.diagnostics import metrics
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric

MODULES = sorted(found.name for found in pkgutil.iter_modules(metrics.__path__))


def declared():
    """(module, attribute, metric) for each metric, in the module whose function it is."""
    return [
        (module, attribute, value)
        for module in MODULES
        for attribute, value in vars(importlib.import_module(f"{metrics.__name__}.{module}")).items()
        if isinstance(value, Metric) and value.function.__module__ == f"{metrics.__name__}.{module}"
    ]


def test_every_declared_metric_is_registered():
    registered = {id(metric) for metric in CATALOGUE.values()}
    missing = [f"{module}.{name}" for module, name, metric in declared() if id(metric) not in registered]
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/metrics is declared but not registered: add the line "
        f"`{missing[0]},` to CATALOGUE in diagnostics/metrics/catalogue.py"
    )


def test_every_registered_metric_is_declared_once_and_under_its_own_name():
    names = [metric.name for _, _, metric in declared()]
    assert sorted(names) == sorted(CATALOGUE)
    assert len(set(names)) == len(names)
    assert all(attribute == metric.name for _, attribute, metric in declared())
    assert all(name == metric.name for name, metric in CATALOGUE.items())


def test_no_metric_has_the_name_of_a_module_or_of_another_public_name():
    """`metrics.shape` must give the module and `diagnostics.judge` the function, whatever was imported before."""
    taken = {found.name for found in pkgutil.iter_modules(diagnostics.__path__)} | set(MODULES)
    taken |= set(diagnostics.__all__) | set(depthscope.__all__)
    assert not taken & set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_metric_is_an_attribute_of_metrics(name):
    assert getattr(depthscope.metrics, name) is CATALOGUE[name]
    assert name in dir(depthscope.metrics)


def test_the_order_is_the_same_whatever_is_imported_first():
    code = (
        "import importlib\n"
        f"for name in {MODULES[::-1]}: importlib.import_module('{metrics.__name__}.' + name)\n"
        "from depthscope.diagnostics import CATALOGUE\n"
        "print(*CATALOGUE)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(CATALOGUE)
