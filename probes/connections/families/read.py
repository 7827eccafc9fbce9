"""Connections whose weights the operations of a forward show, whatever code they are in: see `depthscope.probes.reading`."""

from __future__ import annotations

from depthscope.probes.connections.family import Family

FAMILY = Family(
    name="read",
    constrains={"hc": "", "independent_hc": "H_res = I", "gated": "H_res = I; H_pre is a gate per feature"},
)
