"""Which connection families are known? One file each, and one line here; the first that detects a call reads it."""

from __future__ import annotations

from depthscope.probes.connections.families import altup, returned, width
from depthscope.probes.connections.family import Family

FAMILIES: tuple[Family, ...] = (
    returned.FAMILY,
    width.FAMILY,
    altup.FAMILY,
)
BY_NAME = {family.name: family for family in FAMILIES}
