"""Where was a fault planted, and is a finding there?"""

from __future__ import annotations

from dataclasses import dataclass

import xarray as xr

from depthscope.diagnostics import Finding

WITHIN = 1  # depths


@dataclass(frozen=True)
class Place:
    """The depths, stream or module that a fault reaches; depth 0 is the embedding."""

    # the first and last depth that it can show at; None where it is the whole network
    first: int | None = None
    last: int | None = None
    # whether a finding must begin at `first`, or end at `last`, and not only lie between them
    begins: bool = False
    ends: bool = False
    stream: str | None = None  # the stream that it is about
    module: str = ""  # the module, for what is said of weights

    def holds(self, finding: Finding, analysis: xr.Dataset) -> bool:
        """Whether a finding is at this place, give or take one depth."""
        if self.stream is not None and finding.stream != self.stream:
            return False
        if self.module:
            return finding.axis == "weight" and self._is_of_the_module(finding, analysis)
        if self.first is None or self.last is None:
            return True
        span = depths_of(finding, analysis)
        return span is None or self._contains(*span)

    def _contains(self, first: int, last: int) -> bool:
        inside = self.first - WITHIN <= first and last <= self.last + WITHIN
        begins = not self.begins or abs(first - self.first) <= WITHIN
        ends = not self.ends or abs(last - self.last) <= WITHIN
        return inside and begins and ends

    def _is_of_the_module(self, finding: Finding, analysis: xr.Dataset) -> bool:
        names = analysis["weight"].values[finding.first : finding.last + 1]
        return any(f"{name}.".startswith(f"{self.module}.") for name in names)


def depths_of(finding: Finding, analysis: xr.Dataset) -> tuple[int, int] | None:
    """First and last depth of a finding; a connection is at the depth that it writes; None for the whole run."""
    if finding.axis == "depth":
        return finding.first, finding.last
    if finding.axis != "connection":
        return None
    if "depth_out" not in analysis.coords:
        return finding.first + 1, finding.last + 1
    written = analysis["depth_out"].values
    return int(written[finding.first]), int(written[finding.last])
