"""What was measured, and how? Paragraphs for the methods of a paper, from the settings and the definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from depthscope.app.figures.build.captions import selection_words
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.provenance import depthscope_version
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import spoken
from depthscope.app.text.bibliography import keys_of, source_words
from depthscope.app.text.evidence import proof_sentence
from depthscope.app.text.latex import Latex, cite, tex
from depthscope.app.text.numbers import number, sentence
from depthscope.app.text.visible import LONGEST_NAME, shortened
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.metrics.intervals import margin

__all__ = ["methods_latex", "methods_text"]

MOST_NAMED = 4
"""Runs up to which the methods name each with what it is; of more the table of runs does."""

Sentence = tuple[str, tuple[str, ...], str]
"""Words, the bibliography keys after them, and a formula in TeX after its first word; both may be empty."""


def methods_latex(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str
) -> list[Latex]:
    """The methods as LaTeX.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    view : Selection
        Which version of the numbers is shown.
    metrics : iterable of str
        What is shown, and therefore defined.
    by : str
        Attribute by which runs are grouped; empty for none.

    Returns
    -------
    list of Latex
        One for each paragraph.
    """
    return [
        Latex(" ".join(map(_sentence_latex, paragraph)))
        for paragraph in _paragraphs(readings, view, metrics, by)
    ]


def methods_text(readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str) -> str:
    """The methods as plain text, with authors and years.

    Parameters
    ----------
    readings, view, metrics, by
        See `methods_latex`.

    Returns
    -------
    str
    """
    paragraphs = (
        " ".join(map(_sentence_text, paragraph)) for paragraph in _paragraphs(readings, view, metrics, by)
    )
    return "\n\n".join(paragraphs) + "\n"


def _sentence_latex(said: Sentence) -> str:
    words, keys, formula = said
    code = tex(words.removesuffix("."))
    if formula:
        # After the name: "effective rank $…$: how many directions …".
        name, colon, rest = words.removesuffix(".").partition(":")
        code = Latex(f"{tex(name)} (${formula}$){colon}{tex(rest)}")
    return f"{code}~{cite(keys)}." if keys else f"{code}."


def _sentence_text(said: Sentence) -> str:
    words, keys, _ = said
    sources = "; ".join(map(source_words, keys))
    return f"{words.removesuffix('.')} ({sources})." if keys else f"{words.removesuffix('.')}."


def _paragraphs(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str
) -> list[list[Sentence]]:
    shown = [name for name in dict.fromkeys(metrics) if name in CATALOGUE]
    paragraphs = [
        [*_runs(readings), *_capture(readings)],
        [*_slices(readings, view, shown, by)],
        [_definition(name) for name in shown],
        [*_verdicts(readings)],
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def _runs(readings: Sequence[Reading]) -> Iterable[Sentence]:
    version = f"with depthscope {depthscope_version()}"
    if len(readings) > MOST_NAMED:
        yield f"We measured {len(readings)} runs {version}; the table of runs lists them", (), ""
        return
    described = "; ".join(_described(reading) for reading in readings)
    yield f"We measured {len(readings)} run{'s' if len(readings) > 1 else ''} {version}: {described}", (), ""


def _described(reading: Reading) -> str:
    attrs, analysis = reading.attrs, reading.analysis
    streams = attrs.get("n_streams") or 1
    layers = int(analysis["layer"].max()) + 1 if "layer" in analysis.coords else 0
    parts = [
        f"model {shortened(str(attrs['model']), LONGEST_NAME)}" if attrs.get("model") else "",
        f"connections: {shortened(str(attrs['family']), LONGEST_NAME)}" if attrs.get("family") else "",
        f"{layers} layers" if layers else "",
        f"{streams} residual streams" if streams != 1 else "one residual stream",
        f"computed in {attrs['dtype']}" if attrs.get("dtype") else "",
        f"seed {attrs['seed']}" if attrs.get("seed") is not None else "",
    ]
    return f"{reading.name} ({', '.join(filter(None, parts))})"


def _capture(readings: Sequence[Reading]) -> Iterable[Sentence]:
    counts = {
        float(reading.analysis["num_tokens"].sel(scope="data").max())
        for reading in readings
        if "num_tokens" in reading.analysis and "scope" in reading.analysis["num_tokens"].dims
    }
    counts = {count for count in counts if math.isfinite(count)}
    if counts:
        tokens = " to ".join(f"{count:g}" for count in sorted({min(counts), max(counts)}))
        yield (
            f"The residual state before the first block and after every step of a block was kept for {tokens} real tokens "
            "of every run; padding was left out",
            (),
            "",
        )
    digests = {str(reading.attrs.get("data_digest")) for reading in readings} - {"None", ""}
    if len(readings) > 1 and len(digests) > 1:
        yield "The runs have not all seen the same data", (), ""
    elif len(readings) > 1 and digests:
        yield "All runs have seen the same data", (), ""
    errors = [reading.attrs.get("reconstruction_error") for reading in readings]
    known = [float(error) for error in errors if isinstance(error, int | float)]
    if known:
        yield (
            "H_res[i, j] carries stream j to stream i, and products have the later connection on the left; each reading was "
            f"checked by recomputing the next state from its parts (largest relative error {number(max(known))})",
            ("xie2025mhc",),
            "",
        )
    unproven = proof_sentence({reading.name: reading.attrs for reading in readings})
    if unproven:
        yield unproven, (), ""


def _slices(
    readings: Sequence[Reading], view: Selection, metrics: Sequence[str], by: str
) -> Iterable[Sentence]:
    dims = {
        str(dim)
        for reading in readings
        for name in metrics
        if name in reading.analysis
        for dim in reading.analysis[name].dims
    }
    words = selection_words(dims, view)
    if words:
        yield f"Unless a caption says otherwise, numbers are: {words}", (), ""
    errors = [
        reading.analysis[f"{name}_stderr"]
        for reading in readings
        for name in metrics
        if f"{name}_stderr" in reading.analysis
    ]
    known = sorted({margin(error)[1] for error in errors if bool(error.notnull().any())})
    if known:
        yield (
            f"Errors are {' or '.join(known)}, from the jackknife over sequences where a metric is no mean over them",
            (),
            "",
        )
    if any(f"{name}_null" in reading.analysis for reading in readings for name in metrics):
        yield (
            "Each rank and similarity is shown with its null, the value expected of independent entries at the same number of "
            "tokens and features",
            (),
            "",
        )
    if by:
        yield (
            f"Runs are grouped by {by}: curves are means over the runs of a group with their 95 % interval (Student's t), and "
            "groups are compared by exchanging the labels of their runs, corrected for the number of positions",
            (),
            "",
        )
    if view.axis == "relative":
        yield "Runs of different depth are compared at the same share of their depth", (), ""


def _definition(name: str) -> Sentence:
    metric = CATALOGUE[name]
    title, _, rest = metric.description.partition(":")
    meaning = rest.strip() or title.strip()
    meaning = meaning[:1].lower() + meaning[1:] if meaning[1:2].islower() else meaning
    text = sentence([f"{spoken(name)}: {meaning.removesuffix('.')}", metric.estimator])
    return text, tuple(keys_of([metric.cite])), metric.symbol


def _verdicts(readings: Sequence[Reading]) -> Iterable[Sentence]:
    found = [
        finding for reading in readings for finding in reading.findings if finding.severity.name != "INFO"
    ]
    if found:
        keys = tuple(keys_of(finding.source for finding in found))
        yield (
            "Verdicts compare these numbers with fixed limits; the table of findings has each with its limit and its source, "
            "which is this project where no publication states one",
            keys,
            "",
        )
    else:
        yield "No number crossed the limit of a verdict", (), ""
