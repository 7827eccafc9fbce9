"""How is a figure told in words? Captions state how it was measured, alt texts what is seen."""

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import pick
from depthscope.app.figures.specification import Analyses, Array, Line, Selection
from depthscope.app.text.numbers import number

__all__ = [
    "counted",
    "describe_lines",
    "describe_matrix",
    "dims_of",
    "label_of",
    "left_out",
    "reduction_of",
]

_SCOPES = {
    "sequence": "within each sequence, then averaged",
    "data": "over the tokens of all sequences pooled",
}
_TOKENS = {"all": "all tokens", "ordinary": "tokens without massive activations"}
_CENTERING = {"raw": "not centred", "centred": "mean token removed"}
_REDUCTIONS = {
    "mean": "mean over tokens",
    "median": "median over tokens",
    "p1": "1st percentile over tokens",
    "p99": "99th percentile over tokens",
    "max": "largest over tokens",
}
_ESTIMATORS = {"biased": "biased estimator (HSIC₀)", "unbiased": "unbiased estimator (HSIC₁)"}


def label_of(analyses: Analyses, name: str, fallback: str) -> str:
    """Axis label of a variable: its long name, and its units where it has some.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    name : str
        Variable.
    fallback : str
        Label where no run says.

    Returns
    -------
    str
    """
    attrs = next((dict(data[name].attrs) for data in analyses.values() if name in data), {})
    units = str(attrs.get("units", "") or "")
    return fallback if units in ("", "1") else f"{fallback} ({units})"


def reduction_of(dims: set[str], choice: Selection) -> str:
    """What was done to get from raw numbers to the ones drawn, as one phrase.

    Parameters
    ----------
    dims : set of str
        Dimensions of the variable before the selection.
    choice : Selection
        What was selected.

    Returns
    -------
    str
    """
    said = []
    for dim, words in (
        ("scope", _SCOPES),
        ("tokens", _TOKENS),
        ("centering", _CENTERING),
        ("estimator", _ESTIMATORS),
        ("reduction", _REDUCTIONS),
    ):
        if dim in dims:
            said.append(words[getattr(choice, dim)])
    if "stream" in dims and choice.stream not in ("mean", "each"):
        said.append(f"stream {choice.stream}")
    return "; ".join(said)


def counted(analyses: Analyses, choice: Selection, scope: str) -> str:
    """How many tokens stand behind the numbers, from `num_tokens`.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    choice : Selection
        What was selected.
    scope : str
        "sequence" counts the tokens of one sequence, "data" those of all.

    Returns
    -------
    str
        Such as "N = 512 tokens"; a range where runs or depths differ; empty when not recorded.
    """
    known: list[float] = []
    for data in analyses.values():
        array = pick(data, "num_tokens", choice, scope=scope, stream="mean")
        if array is not None:
            known.extend(np.asarray(array.values, dtype=np.float64).ravel())
    known = [n for n in known if np.isfinite(n)]
    if not known:
        return ""
    low, high = min(known), max(known)
    low, high = round(low, 1), round(high, 1)
    count = f"{high:g}" if low == high else f"{low:g} to {high:g}"
    return f"N = {count} tokens" + (" a sequence" if scope == "sequence" else "")


def left_out(analyses: Analyses, drawn: set[str]) -> str:
    """Sentence that names the runs that are missing from a figure, empty when none is.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    drawn : set of str
        Names of the runs that are in the figure.

    Returns
    -------
    str
    """
    missing = [name for name in analyses if name not in drawn]
    return f"Not measured in {', '.join(missing)}." if missing else ""


def describe_lines(lines: tuple[Line, ...], title: str, place: str) -> str:
    """Alt text of curves: first, last, lowest and highest value of each, with the place.

    Parameters
    ----------
    lines : tuple of Line
        Curves; only the measured ones are told.
    title : str
        What is drawn.
    place : str
        Word for a position, "depth" or "connection".

    Returns
    -------
    str
    """
    told = [_describe_line(line, place) for line in lines if line.role == "measured"]
    return f"{title}. " + " ".join(told) if told else f"{title}: nothing was measured."


def _describe_line(line: Line, place: str) -> str:
    """One sentence for one curve."""
    known = np.flatnonzero(np.isfinite(line.y))
    if known.size == 0:
        return f"{line.label}: undefined everywhere."
    first, last = known[0], known[-1]
    low, high = known[np.argmin(line.y[known])], known[np.argmax(line.y[known])]
    if low == high:
        return f"{line.label}: {number(line.y[first])} throughout."
    told = [f"{number(line.y[i])} at {_at(line, i, place)}" for i in (first, last, low, high)]
    return f"{line.label}: {told[0]}, {told[1]}; lowest {told[2]}, highest {told[3]}."


def _at(line: Line, index: int, place: str) -> str:
    """Place of one point: position, and its name where known."""
    name = f" ({line.text[index]})" if line.text is not None else ""
    return f"{place} {line.x[index]:.3g}{name}"


def describe_matrix(matrix: Array, rows: list[str], columns: list[str], title: str, run: str) -> str:
    """Alt text of a heat map: size, range and median, with the cells of the extremes.

    Parameters
    ----------
    matrix : numpy.ndarray
        Shape (rows, columns).
    rows, columns : list of str
        Names of the entries.
    title : str
        What is drawn.
    run : str
        Run it comes from.

    Returns
    -------
    str
    """
    size = f"{title} of {run}, {matrix.shape[0]} by {matrix.shape[1]}"
    known = np.isfinite(matrix)
    if not known.any():
        return f"{size}: undefined everywhere."
    low = np.unravel_index(np.argmin(np.where(known, matrix, np.inf)), matrix.shape)
    high = np.unravel_index(np.argmax(np.where(known, matrix, -np.inf)), matrix.shape)
    lowest, highest = (f"{number(matrix[at])} ({rows[at[0]]} against {columns[at[1]]})" for at in (low, high))
    return f"{size}: lowest {lowest}, highest {highest}, median {number(float(np.median(matrix[known])))}."


def dims_of(analyses: Analyses, name: str) -> set[str]:
    """Dimensions of a variable in the first run that has it.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    name : str
        Variable.

    Returns
    -------
    set of str
    """
    arrays: list[xr.DataArray] = [data[name] for data in analyses.values() if name in data]
    return {str(dim) for dim in arrays[0].dims} if arrays else set()
