"""What do some runs know about one metric? Its curves with bands and nulls, and the words about them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import aligned, fed, names_of, pick, positions, spread_of
from depthscope.app.figures.specification import Analyses, Array, Line, Selection, null_label
from depthscope.app.text.numbers import number, sentence
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

MOST_NAMED = 3
"""Runs that a sentence of a caption names; of more it says how many. A heuristic of ours."""

# An invariant metric has no entry, so that its caption has no sentence.
_BASES = {
    "stream": "Changes when the streams are rotated.",
    "feature": "Changes when the features are rotated.",
}


@dataclass(frozen=True, eq=False)
class Curve:
    """One measured curve with everything that is drawn for it.

    ``line``: the measured values with their band and whiskers.
    ``null``: the value expected without structure.
    ``remarks``: sentences of the caption about it.
    """

    line: Line
    null: Line | None = None
    remarks: tuple[str, ...] = ()

    @property
    def lines(self) -> list[Line]:
        """The measured line, then what is drawn in its colour."""
        null = [] if self.null is None else [self.null]
        return [self.line, *null]


@dataclass(frozen=True, eq=False)
class Measurement:
    """One metric of some runs under one selection: every fact that a figure of it shows.

    ``metric``: variable of the analyses.
    ``analyses``: run name → analysis, those without the metric included.
    ``choice``: which version of the numbers.
    """

    metric: str
    analyses: Analyses
    choice: Selection

    # Runs share the declaration of a metric; its labels and attributes are those of the first run that has it.
    @cached_property
    def variable(self) -> xr.DataArray:
        """The metric in the first run that has it, for its labels; a scalar without attributes where none has."""
        # A generator: `next` opens the first run that has the metric and no other.
        found = (data[self.metric] for data in self.analyses.values() if self.metric in data)
        return next(found, xr.DataArray(np.nan))

    @property
    def dims(self) -> set[str]:
        """Dimensions of the metric before the selection."""
        return set(map(str, self.variable.dims))

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the declaration of the metric wrote on it."""
        return {str(name): value for name, value in self.variable.attrs.items()}

    def of(self, runs: Sequence[str]) -> Measurement:
        """The same for some of the runs."""
        # In the order of the analyses, not of `runs`: it is the order of the colours.
        chosen = {run: data for run, data in self.analyses.items() if run in runs}
        return Measurement(self.metric, chosen, self.choice)

    def slices(self, **fixed: str) -> Iterator[tuple[str, xr.Dataset, xr.DataArray]]:
        """Runs with a defined value under the selection."""
        return fed(self.analyses, self.metric, self.choice, **fixed)

    def curve(
        self, run: str, values: xr.DataArray, *, axis: str, label: str = "", around: str = "", **fixed: str
    ) -> Curve:
        """A measured curve of one run, with its band and its null."""
        data, values = self.analyses[run], values.rename(self.metric)
        spread = spread_of(data, values, self.choice, around, **fixed)
        line = Line(
            positions(values, axis, self.choice.axis),
            np.asarray(values.values, dtype=np.float64),
            f"{run} · {label}" if label else run,
            lower=spread.lower,
            upper=spread.upper,
            error=spread.error,
            group=run,
            text=names_of(values, axis),
        )
        return Curve(line, self.null_line(line, values, run, **fixed), spread.words)

    def null_line(self, like: Line, values: xr.DataArray, run: str, **fixed: str) -> Line | None:
        """The null at the points of a measured line; None where the analysis has none that is defined."""
        null = pick(self.analyses[run], f"{self.metric}_null", self.choice, **fixed)
        if null is None or not bool(null.notnull().any()):
            return None
        # A null may be one number for all depths.
        level = null.values if null.ndim == 0 else aligned(null, values)
        if level is None:
            return None
        # A copy: a broadcast array is read-only and its elements share memory.
        y = np.broadcast_to(np.asarray(level, dtype=np.float64), like.y.shape).copy()
        return Line(like.x, y, null_label(like.label), role="null", group=like.group)

    # --- words

    def axis_label(self, name: str) -> str:
        """A name with the units of the metric, where it has some."""
        # "1" is the unit of pure numbers in the CF conventions, which readers need not see.
        units = str(self.attrs.get("units") or "1")
        return name if units == "1" else f"{name} ({units})"

    def token_words(self, scope: str) -> str:
        """How many tokens of a sequence or of all the numbers come from, such as "N = 512 tokens"; empty without a scope."""
        # A metric with scopes counts those of the selected one, whatever the figure declares.
        scope = self.choice.scope if scope and "scope" in self.dims else scope
        return token_count_words(self.analyses, self.choice, scope) if scope else ""

    def constant_null_words(self) -> str:
        """Sentence about a null that is one declared number, empty where it is not."""
        # A null that is a function has a variable of its own, and is drawn as a line.
        null = self.attrs.get("null") if "depth" in self.dims else None
        return (
            f"Without structure it would be {number(float(null))}." if isinstance(null, int | float) else ""
        )

    def basis_words(self) -> str:
        """Sentence about the basis that the metric depends on, empty for an invariant one and for one stream."""
        # One stream has one basis: what depends on it depends on nothing there.
        basis = str(self.attrs.get("basis", ""))
        streams = any(
            data.sizes.get("stream", 1) > 1 or "connection" in data.dims for data in self.analyses.values()
        )
        return "" if basis == "stream" and not streams else _BASES.get(basis, "")

    def stream_words(self) -> str:
        """Sentence about what all streams together are of gradients, empty for one stream and of other metrics."""
        together = "stream" in self.dims and self.choice.stream == "mean"
        several = any(data.sizes.get("stream", 1) > 1 for data in self.analyses.values())
        of_gradients = self.metric in CATALOGUE and "gradient" in CATALOGUE[self.metric].roots
        if not (together and several and of_gradients):
            return ""
        return "Of several streams: the gradient with respect to their mean, the sum of their gradients."

    def sample_words(self) -> str:
        """Sentences about samples that are too small for the metric, run by run."""
        notes = {run: data.attrs.get("notes", {}).get(self.metric) for run, data in self.analyses.items()}
        known = {run: note.rstrip(".") for run, note in notes.items() if note}
        if len(known) > MOST_NAMED:
            # A sentence for each run would be longer than the figure.
            run, note = next(iter(known.items()))
            return f"The sample is small for {len(known)} of the runs, such as {run}: {note}."
        several = len(self.analyses) > 1
        return " ".join(f"{f'{run}: ' if several else ''}{note}." for run, note in known.items())

    def caption(self, drawn: Sequence[Line], *, scope: str, remarks: Sequence[str] = ()) -> str:
        """Caption of curves: selection, number of tokens, null, remarks, basis, sample, and which runs are missing."""
        runs = {line.group for line in drawn}
        # Tokens and samples are those of the runs that are drawn; the others are named as missing.
        shown = self.of([run for run in self.analyses if run in runs])
        parts = [
            sentence([selection_words(shown.dims, self.choice), shown.token_words(scope)]),
            null_words(self.metric)
            if any(line.role == "null" for line in drawn)
            else shown.constant_null_words(),
            *remarks,
            shown.stream_words(),
            shown.basis_words(),
            shown.sample_words(),
            self.missing_words(runs),
        ]
        return " ".join(part for part in parts if part)

    def missing_words(self, drawn: set[str]) -> str:
        """Sentence that names the runs that are missing from a figure, empty when none is."""
        missing = [run for run in self.analyses if run not in drawn]
        if len(missing) > MOST_NAMED:
            return f"Not measured in {len(missing)} of the {len(self.analyses)} runs."
        return f"Not measured in {', '.join(missing)}." if missing else ""


def null_words(metric: str) -> str:
    """Sentence of a caption about the null of a metric, with the law that gives it."""
    null = CATALOGUE[metric].null if metric in CATALOGUE else None
    # The docstring of a null is a noun phrase; after "; NaN" comes where it is undefined.
    docstring = (null.__doc__ or "") if callable(null) else ""
    what = docstring.partition("\n")[0].partition("; NaN")[0].rstrip(".")
    what = what or "independent noise of the same shape"
    # A phrase that begins with a formula or a name, such as "IQR", stays capital.
    what = what if what[1:2].isupper() else what[0].lower() + what[1:]
    return f"Dashed: the baseline, {what}."


# In the order in which a caption names them: which tokens, what was done to them, how they became one number.
_LABEL_WORDS = {
    "scope": {
        "sequence": "within each sequence, then averaged",
        "data": "over the tokens of all sequences pooled",
    },
    "tokens": {"all": "all tokens", "ordinary": "tokens without massive activations"},
    "centering": {"raw": "not centred", "centred": "mean token removed"},
    "estimator": {"biased": "biased estimator (HSIC₀)", "unbiased": "unbiased estimator (HSIC₁)"},
    "reduction": {
        "mean": "mean over tokens",
        "median": "median over tokens",
        "p1": "1st percentile over tokens",
        "p99": "99th percentile over tokens",
        "max": "largest over tokens",
    },
}


def selection_words(dims: Iterable[str], choice: Selection) -> str:
    """What was done to get from raw numbers to the ones shown, as one phrase."""
    known = set(dims)
    phrases = [words[getattr(choice, dim)] for dim, words in _LABEL_WORDS.items() if dim in known]
    # The mean is the default, and with "each" the legend names the streams.
    if "stream" in known and choice.stream not in ("mean", "each"):
        phrases.append(f"stream {choice.stream}")
    return "; ".join(phrases)


def versions_words(dims: Iterable[str], choice: Selection) -> str:
    """As `selection_words`, of metrics that have not all of these dimensions; empty where none has several versions."""
    words = selection_words(dims, choice)
    return f"of metrics with several versions: {words}" if words else ""


def token_count_words(analyses: Analyses, choice: Selection, scope: str) -> str:
    """How many tokens the numbers come from, by `num_tokens`.

    ``scope``: "sequence" counts the tokens of one sequence, "data" those of all.
    Returns: Such as "N = 512 tokens"; a range where runs or depths differ; empty when not recorded.
    """
    found = [pick(data, "num_tokens", choice, scope=scope, stream="mean") for data in analyses.values()]
    # One count for each depth where stages of a network differ in it, such as those of a convolutional one.
    values = [np.ravel(array.values) for array in found if array is not None]
    counts = np.concatenate(values) if values else np.zeros(0)
    counts = counts[np.isfinite(counts)]  # NaN where a run has no such slice
    if counts.size == 0:
        return ""
    # One decimal: per sequence the count is a mean over sequences of different length.
    low, high = (round(float(end), 1) for end in (counts.min(), counts.max()))
    count = f"{high:g}" if low == high else f"{low:g} to {high:g}"
    return f"N = {count} tokens" + (" per sequence" if scope == "sequence" else "")


def describe_lines(lines: Sequence[Line], title: str, axis: str) -> str:
    """Alt text of curves: first, last, lowest and highest value of each, with their positions."""
    # The caption explains nulls.
    sentences = [_describe_line(line, axis) for line in lines if line.role == "measured"]
    return f"{title}. {' '.join(sentences)}" if sentences else f"{title}: nothing was measured."


def _describe_line(line: Line, axis: str) -> str:
    known = np.flatnonzero(np.isfinite(line.y))
    if known.size == 0:
        return f"{line.label}: undefined everywhere."
    lowest, highest = known[np.argmin(line.y[known])], known[np.argmax(line.y[known])]
    # Also a line with one known point: it has no first and last value to compare.
    if lowest == highest:
        return f"{line.label}: {number(line.y[lowest])} throughout."

    def point(index: int) -> str:
        name = f" ({line.text[index]})" if line.text is not None else ""
        return f"{number(line.y[index])} at {axis} {line.x[index]:.3g}{name}"

    ends = f"{point(known[0])}, {point(known[-1])}"
    return f"{line.label}: {ends}; lowest {point(lowest)}, highest {point(highest)}."


def describe_matrix(
    matrix: Array, rows: Sequence[str], columns: Sequence[str], *, title: str, run: str
) -> str:
    """Alt text of a heat map: size, range and median, with the cells of the extremes."""
    size = f"{title} of {run}, {matrix.shape[0]} by {matrix.shape[1]}"
    known = np.isfinite(matrix)
    if not known.any():
        return f"{size}: undefined everywhere."

    def cell(flat: int) -> str:
        row, column = divmod(flat, matrix.shape[1])
        return f"{number(matrix[row, column])} ({rows[row]} against {columns[column]})"

    # ±inf in place of NaN keeps the flat index that of the full matrix.
    lowest = cell(int(np.argmin(np.where(known, matrix, np.inf))))
    highest = cell(int(np.argmax(np.where(known, matrix, -np.inf))))
    return f"{size}: lowest {lowest}, highest {highest}, median {number(float(np.median(matrix[known])))}."


def remarks_by_run(remarks: Iterable[tuple[str, str]], runs: Collection[str]) -> list[str]:
    """Remarks about some runs, each once; those that are not about all of them name theirs.

    ``remarks``: run, and a sentence about it, such as "Band: ± …".

    Examples
    --------
    >>> remarks_by_run([("a", "Band: wide."), ("b", "Band: wide."), ("b", "No error: one sequence.")], "ab")
    ['Band: wide.', 'No error of b: one sequence.']
    """
    runs_of: dict[str, dict[str, None]] = {}
    for run, remark in remarks:
        runs_of.setdefault(remark, {})[run] = None
    return [
        remark if set(known) == set(runs) else remark.replace(":", f" of {', '.join(known)}:", 1)
        for remark, known in runs_of.items()
    ]
