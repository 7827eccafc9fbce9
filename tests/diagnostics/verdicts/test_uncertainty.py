"""A number within its uncertainty of a limit is not decided."""

from __future__ import annotations

import xarray as xr

from depthscope import Severity
from depthscope.diagnostics.metrics.intervals import DEGREES
from depthscope.diagnostics.verdicts import uncertainty
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, verdict
from depthscope.diagnostics.verdicts.rule import Kind


@verdict(Kind.FACT, metric="norm", judges="size", limits=Limits(warn=10.0, fail=100.0))
def large(norm):
    """Large.

    Make it smaller.
    """
    yield Profile(norm)


@verdict(Kind.FACT, metric="norm", judges="size", limits=Limits(warn=2.0))
def larger_than_other(norm, other):
    """Larger than another.

    Make it smaller.
    """
    yield Profile(norm / other)


def analysis(norm: list[float], error: float, *, sequences: int = 5, **more) -> xr.Dataset:
    values = xr.DataArray(norm, dims="depth")
    stderr = xr.full_like(values, error).assign_attrs({DEGREES: sequences - 1})
    return xr.Dataset({"norm": values, "norm_stderr": stderr, **more})


def test_what_is_beyond_the_limit_in_the_whole_interval_stays():
    (found,) = uncertainty.findings(large, analysis([1.0, 20.0], 3.0))
    assert found.severity == Severity.WARN
    assert found.undecided == ""


def test_what_may_be_on_the_other_side_is_not_decided():
    # Half of the interval is 2.776 × 4 = 11.1: it reaches from 8.9 to 31.
    (found,) = uncertainty.findings(large, analysis([1.0, 20.0], 4.0))
    assert found.severity == Severity.INFO
    assert found.sentence.startswith("The size is 20 at depth 1, limit 10")
    assert "within the 95 % interval over 5 sequences" in found.sentence
    assert found.first == found.last == 1


def test_numbers_are_moved_together_and_one_by_one():
    # Moved together the ratio stays above 2; it is the other number alone that takes it below.
    other = xr.DataArray([1.0], dims="depth")
    stderr = xr.full_like(other, 0.2).assign_attrs({DEGREES: 4})
    (found,) = uncertainty.findings(
        larger_than_other, analysis([2.5], 0.001, other=other, other_stderr=stderr)
    )
    assert found.severity == Severity.INFO


def test_without_an_interval_nothing_changes():
    plain = analysis([20.0], 40.0)
    del plain["norm_stderr"].attrs[DEGREES]
    assert uncertainty.findings(large, plain)[0].severity == Severity.WARN
    assert uncertainty.findings(large, plain.drop_vars("norm_stderr"))[0].severity == Severity.WARN
