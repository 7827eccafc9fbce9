"""How far may a number be from that of all sequences? Student's t interval of a standard error over a few of them."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.quantities.over_sequences import DEGREES

LEVEL = 0.95
"""The probability with which an interval is to cover what all sequences would give."""


def factor(degrees: float, level: float = LEVEL) -> float:
    r"""By how many standard errors an interval reaches to each side: a quantile of Student's t.

    With few sequences the standard error is itself uncertain. ± 1.96 of them, right for a known error, then cover less than
    they say: measured, 0.81 to 0.91 with 4 to 8 sequences, where Student's t covers 0.88 to 0.98.

    Examples
    --------
    >>> round(factor(3), 3), round(factor(1000), 3)
    (3.182, 1.962)
    """
    from scipy.special import stdtrit  # scipy.stats takes ten times as long to import

    return float(stdtrit(degrees, (1 + level) / 2))


def half_width(error: xr.DataArray) -> xr.DataArray:
    r"""Half the width of the interval around a value, :math:`t_{S-1} \cdot \mathrm{se}`.

    ``error``: A standard error as `analyze` gives it, ``<metric>_stderr``.
    It does not cover the bias of a small sample, such as that of a rank.
    Raises InputError: Where the error does not say how many sequences it comes from, as those written by earlier
    versions.
    """
    if DEGREES not in error.attrs:
        raise InputError(
            f"{error.name or 'the error'} does not say how many sequences it comes from (attribute {DEGREES!r}); "
            "analyze the run again: analyze(run)"
        )
    return error * factor(float(error.attrs[DEGREES]))


def margin(error: xr.DataArray) -> tuple[xr.DataArray, str]:
    """What is printed after ± and drawn as a band, and its name.

    ``error``: A standard error as `analyze` gives it.
    Returns: Half of the interval; the standard error itself where its number of sequences is not known.
    """
    if DEGREES not in error.attrs:
        return error, "one standard error over sequences"
    sequences = int(error.attrs[DEGREES]) + 1
    return half_width(error), f"half of a {100 * LEVEL:g} % interval (Student's t over {sequences} sequences)"
