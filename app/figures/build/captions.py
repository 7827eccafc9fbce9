"""What do captions and alt texts say? Captions how a number was measured, alt texts what there is to see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from depthscope.app.figures.build.values import pick
from depthscope.app.figures.specification import Analyses, Array, Line, Selection
from depthscope.app.text.numbers import number

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
