"""Every verdict that a module of `diagnostics/verdicts` declares is in VERDICTS."""

from __future__ import annotations

from depthscope.diagnostics import verdicts
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.declaration import Verdict
from tests.rules.registers import declared, order_in_a_fresh_process, unregistered


def test_every_declared_verdict_is_registered():
    missing = unregistered(verdicts, Verdict, VERDICTS)
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/verdicts is declared but not registered: add its "
        "file to ROOMS in diagnostics/verdicts/__init__.py"
    )


def test_every_registered_verdict_is_declared_once_and_under_its_own_name():
    names = [each.name for _, _, each in declared(verdicts, Verdict)]
    assert sorted(names) == sorted(VERDICTS)
    assert len(set(names)) == len(names)
    assert all(attribute == each.name for _, attribute, each in declared(verdicts, Verdict))
    assert all(name == each.name for name, each in VERDICTS.items())


def test_the_order_is_the_same_whatever_is_imported_first():
    assert order_in_a_fresh_process(verdicts, "depthscope.diagnostics.verdicts.VERDICTS") == list(VERDICTS)
