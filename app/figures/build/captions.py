"""What does the caption of a curve say? How it was measured, on how much, against what, and in which basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from depthscope.app.figures.build.laws import null_words
from depthscope.app.figures.build.words import counted, dims_of, left_out, reduction_of
from depthscope.app.figures.specification import Analyses, Line, Selection
from depthscope.app.text.numbers import number

__all__ = ["basis_words", "caption_of", "constant_null", "sample_words"]

_BASES = {
    "stream": "Depends on the basis of the streams.",
    "feature": "Depends on the basis of the features.",
}


def caption_of(
    metric: str,
    analyses: Analyses,
    choice: Selection,
    lines: Sequence[Line],
    *,
    scope: str,
    said: Sequence[str] = (),
) -> str:
    """Caption of curves: reduction, count, null, basis, what the figure adds, and which runs are missing.

    Parameters
    ----------
    metric : str
        Variable of the analysis.
    analyses : mapping
        Run name → analysis.
    choice : Selection
        What was selected.
    lines : sequence of Line
        What is drawn.
    scope : str
        Tokens behind a number whose variable has no scopes, "data" or "sequence"; empty for no tokens.
    said : sequence of str
        Sentences between the null and the basis; empty ones are left out.

    Returns
    -------
    str
    """
    drawn = {line.group for line in lines}
    shown = {run: analyses[run] for run in analyses if run in drawn}
    dims = dims_of(shown, metric)
    tokens = counted(shown, choice, choice.scope if "scope" in dims else scope) if scope else ""
    head = "; ".join(part for part in (reduction_of(dims, choice), tokens) if part)
    parts = [f"{head[0].upper()}{head[1:]}." if head else ""]
    parts.append(
        null_words(metric) if any(line.role == "null" for line in lines) else constant_null(shown, metric)
    )
    parts += [*said, basis_words(shown, metric), sample_words(shown, metric), left_out(analyses, drawn)]
    return " ".join(part for part in parts if part)


def constant_null(analyses: Analyses, metric: str) -> str:
    """Sentence about a null that is one number for every depth, empty where it is not.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    metric : str
        Variable.

    Returns
    -------
    str
    """
    null = _attrs(analyses, metric).get("null") if "depth" in dims_of(analyses, metric) else None
    return f"Without structure it would be {number(float(null))}." if isinstance(null, int | float) else ""


def basis_words(analyses: Analyses, metric: str) -> str:
    """Sentence about the basis that a metric depends on, empty for an invariant one and for one stream.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    metric : str
        Variable.

    Returns
    -------
    str
    """
    basis = str(_attrs(analyses, metric).get("basis", ""))
    if basis == "stream" and not any(_has_streams(data) for data in analyses.values()):
        return ""
    return _BASES.get(basis, "")


def sample_words(analyses: Analyses, metric: str) -> str:
    """Sentences about a sample that is too small for a metric, run by run.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    metric : str
        Variable.

    Returns
    -------
    str
    """
    notes = {run: data.attrs.get("notes", {}).get(metric, "") for run, data in analyses.items()}
    several = len(analyses) > 1
    return " ".join(
        f"{f'{run}: ' if several else ''}{note.rstrip('.')}." for run, note in notes.items() if note
    )


def _attrs(analyses: Analyses, metric: str) -> Mapping[str, Any]:
    return next(
        ({str(k): v for k, v in data[metric].attrs.items()} for data in analyses.values() if metric in data),
        {},
    )


def _has_streams(data: xr.Dataset) -> bool:
    return data.sizes.get("stream", 1) > 1 or "connection" in data.dims
