"""Which connection families are known? One file and one line each; the first that detects a call reads it."""

from __future__ import annotations

from importlib import import_module

from depthscope.probes.connections.family import Family

# Files of this folder. A later family sees only the calls that no earlier one took for its own.
REGISTERED = (
    "returned",
    "width",
    "altup",
    "traced",
    "read",
)
FAMILIES: tuple[Family, ...] = tuple(import_module(f"{__name__}.{name}").FAMILY for name in REGISTERED)
BY_NAME = {family.name: family for family in FAMILIES}
