"""Which colour is a run drawn in? The same in every figure, table and page that shows the same runs."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["run_colours"]

# Okabe and Ito's colours, in an order in which neighbours differ in grey too; yellow is too light for a line. Then darker
# and lighter ones of the same hues, for up to fourteen runs.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"),
    *("#003F63", "#7A3600", "#00553E", "#7D3A60", "#7F7F7F", "#A6D8F5", "#8A5F00"),
)


def run_colours(runs: Sequence[str]) -> dict[str, str]:
    """The colour of each run, by its place among all runs that are shown together.

    Parameters
    ----------
    runs : sequence of str
        Names, all of them in every figure: a run that a figure lacks keeps its colour for the next one.

    Returns
    -------
    dict of str to str
        Hexadecimal; from the fifteenth run on colours recur.

    Examples
    --------
    >>> run_colours(["hc", "mhc"])
    {'hc': '#0072B2', 'mhc': '#D55E00'}
    """
    return {run: _COLOURS[place % len(_COLOURS)] for place, run in enumerate(dict.fromkeys(runs))}
