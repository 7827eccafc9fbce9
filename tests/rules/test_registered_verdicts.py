"""Every verdict that a module of `diagnostics/verdicts` declares is in VERDICTS."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

from depthscope.diagnostics import verdicts
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.declaration import Verdict

MODULES = sorted(found.name for found in pkgutil.iter_modules(verdicts.__path__))


def declared():
    """(module, attribute, verdict) for each verdict, in the module whose function it is."""
    return [
        (module, attribute, value)
        for module in MODULES
        for attribute, value in vars(importlib.import_module(f"{verdicts.__name__}.{module}")).items()
        if isinstance(value, Verdict) and value.function.__module__ == f"{verdicts.__name__}.{module}"
    ]


def test_every_declared_verdict_is_registered():
    registered = {id(each) for each in VERDICTS.values()}
    missing = [f"{module}.{name}" for module, name, each in declared() if id(each) not in registered]
    assert not missing, (
        f"{', '.join(missing)} of diagnostics/verdicts is declared but not registered: add the line "
        f"`{missing[0]},` to VERDICTS in diagnostics/verdicts/__init__.py"
    )


def test_every_registered_verdict_is_declared_once_and_under_its_own_name():
    names = [each.name for _, _, each in declared()]
    assert sorted(names) == sorted(VERDICTS)
    assert len(set(names)) == len(names)
    assert all(attribute == each.name for _, attribute, each in declared())
    assert all(name == each.name for name, each in VERDICTS.items())


def test_the_order_is_the_same_whatever_is_imported_first():
    code = (
        "import importlib\n"
        f"for name in {MODULES[::-1]}: importlib.import_module('{verdicts.__name__}.' + name)\n"
        "from depthscope.diagnostics.verdicts import VERDICTS\n"
        "print(*VERDICTS)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(VERDICTS)
