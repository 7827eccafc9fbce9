"""Every law that a module of `diagnostics/theory` declares is in LAWS, in an order that no import can change."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

from depthscope.diagnostics import theory
from depthscope.diagnostics.theory.catalogue import LAWS
from depthscope.diagnostics.theory.laws import Law

MODULES = sorted(found.name for found in pkgutil.iter_modules(theory.__path__))


def declared():
    """(module, attribute, law) for each law of a module; none imports those of another."""
    return [
        (module, attribute, value)
        for module in MODULES
        for attribute, value in vars(importlib.import_module(f"{theory.__name__}.{module}")).items()
        if isinstance(value, Law)
    ]


def test_every_declared_law_is_registered():
    registered = {id(law) for law in LAWS.values()}
    missing = [f"{module}.{name}" for module, name, law in declared() if id(law) not in registered]
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/theory is declared but not registered: add the line "
        f"`{missing[0]},` to LAWS in diagnostics/theory/catalogue.py"
    )


def test_every_registered_law_is_declared_once_and_under_its_own_name():
    assert sorted(law.name for _, _, law in declared()) == sorted(LAWS)
    assert all(attribute.lower() == law.name for _, attribute, law in declared())
    assert all(name == law.name for name, law in LAWS.items())


def test_no_law_has_the_name_of_a_module():
    assert not set(MODULES) & set(LAWS)


def test_the_order_is_the_same_whatever_is_imported_first():
    code = (
        "import importlib\n"
        f"for name in {MODULES[::-1]}: importlib.import_module('{theory.__name__}.' + name)\n"
        "from depthscope.diagnostics.theory import LAWS\n"
        "print(*LAWS)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(LAWS)
