"""Every law that a module of `diagnostics/theory` declares is in LAWS, in an order that no import can change."""

from __future__ import annotations

from depthscope.diagnostics import theory
from depthscope.diagnostics.theory.catalogue import LAWS
from depthscope.diagnostics.theory.laws import Law
from tests.rules.registers import declared, modules_of, order_in_a_fresh_process, unregistered


def test_every_declared_law_is_registered():
    missing = unregistered(theory, Law, LAWS)
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/theory is declared but not registered: add the line "
        f"`{missing[0]},` to LAWS in diagnostics/theory/catalogue.py"
    )


def test_every_registered_law_is_declared_once_and_under_its_own_name():
    assert sorted(law.name for _, _, law in declared(theory, Law)) == sorted(LAWS)
    assert all(attribute.lower() == law.name for _, attribute, law in declared(theory, Law))
    assert all(name == law.name for name, law in LAWS.items())


def test_no_law_has_the_name_of_a_module():
    assert not set(modules_of(theory)) & set(LAWS)


def test_the_order_is_the_same_whatever_is_imported_first():
    assert order_in_a_fresh_process(theory, "depthscope.diagnostics.theory.LAWS") == list(LAWS)
