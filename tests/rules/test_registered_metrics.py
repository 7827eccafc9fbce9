"""Every metric that a module of `diagnostics/metrics` declares is in CATALOGUE, and reachable by its name."""

from __future__ import annotations

import pkgutil

import depthscope
from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import metrics
from depthscope.diagnostics.metrics.catalogue import DECLARED
from depthscope.diagnostics.metrics.declaration import Metric
from tests.rules.registers import declared, modules_of, order_in_a_fresh_process, unregistered


def test_every_declared_metric_is_registered():
    missing = unregistered(metrics, Metric, CATALOGUE)
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/metrics is declared but not registered: add the line "
        f"`{missing[0]},` to DECLARED in diagnostics/metrics/catalogue.py"
    )


def test_every_registered_metric_is_declared_once_and_under_its_own_name():
    names = [metric.name for _, _, metric in declared(metrics, Metric)]
    assert sorted(names) == sorted(metric.name for metric in DECLARED)
    assert set(CATALOGUE) == set(names)
    assert len(set(names)) == len(names)
    assert all(attribute == metric.name for _, attribute, metric in declared(metrics, Metric))
    assert all(name == metric.name for name, metric in CATALOGUE.items())


def test_no_metric_has_the_name_of_a_module_or_of_another_public_name():
    """`metrics.shape` must give the module and `diagnostics.judge` the function, whatever was imported before."""
    taken = {found.name for found in pkgutil.iter_modules(diagnostics.__path__)} | set(modules_of(metrics))
    taken |= set(diagnostics.__all__) | set(depthscope.__all__)
    assert not taken & set(CATALOGUE)


def test_every_metric_is_an_attribute_of_metrics():
    for name in CATALOGUE:
        assert getattr(depthscope.metrics, name) is CATALOGUE[name]
        assert name in dir(depthscope.metrics)


def test_the_order_is_the_same_whatever_is_imported_first():
    assert order_in_a_fresh_process(metrics, "depthscope.diagnostics.CATALOGUE") == list(CATALOGUE)
