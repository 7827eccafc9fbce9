"""What do the modules of a package declare, and in which order does a fresh process find it? For the rules of registers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType
from typing import Any


def modules_of(package: ModuleType) -> list[str]:
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__))


def declared(package: ModuleType, kind: type) -> list[tuple[str, str, Any]]:
    """(module, attribute, value) for each value of a kind, in the module that declares it and not where it is imported."""
    return [
        (name, attribute, value)
        for name in modules_of(package)
        for attribute, value in vars(importlib.import_module(f"{package.__name__}.{name}")).items()
        if isinstance(value, kind)
        and _home(value, f"{package.__name__}.{name}") == f"{package.__name__}.{name}"
    ]


def _home(value: Any, default: str) -> str:
    # A figure, and a law that is a metric's own null, have no function that tells where they are from.
    function = getattr(value, "function", None)
    return default if function is None else function.__module__


def unregistered(package: ModuleType, kind: type, register: dict[str, Any]) -> list[str]:
    """``module.attribute`` of each declared value that is not in the register."""
    # By identity: a copy under the same name is not what was declared.
    registered = {id(value) for value in register.values()}
    return [
        f"{module}.{name}" for module, name, value in declared(package, kind) if id(value) not in registered
    ]


def order_in_a_fresh_process(package: ModuleType, register: str) -> list[str]:
    """The names of a register, where all modules of the package were imported before it, in reverse order."""
    # A process of its own: in this one the register has been imported already.
    source, _, name = register.rpartition(".")
    code = (
        "import importlib\n"
        f"for name in {modules_of(package)[::-1]}: importlib.import_module('{package.__name__}.' + name)\n"
        f"from {source} import {name}\n"
        f"print(*{name})\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.split()
