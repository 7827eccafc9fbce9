"""What was measured, and how? Paragraphs for the methods of a paper, from the settings and the definitions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from depthscope.app.figures.build.measurement import versions_words
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.provenance import depthscope_version
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import interval_words, spoken
from depthscope.app.text.bibliography import cited, keys_of
from depthscope.app.text.latex import Latex, with_citations
from depthscope.app.text.numbers import number, proof_sentence
from depthscope.app.text.visible import LONGEST_NAME, shortened
from depthscope.diagnostics import CATALOGUE

MOST_NAMED = 4
"""Runs up to which the methods name each with what it is; of more the table of runs does."""


def methods_latex(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str, flat: Sequence[str] = ()
) -> list[Latex]:
    """The methods as LaTeX.

    ``view``: which version of the numbers is shown.
    ``by``: attribute by which runs are grouped; empty for none.
    ``flat``: panels that were left out, since their curves are the same everywhere.
    """
    return [with_citations(paragraph) for paragraph in _paragraphs(readings, view, metrics, by, flat)]


def methods_text(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str, flat: Sequence[str] = ()
) -> str:
    """The methods as plain text, with authors and years."""
    return "\n\n".join(map(cited, _paragraphs(readings, view, metrics, by, flat))) + "\n"


def _paragraphs(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str, flat: Sequence[str]
) -> list[str]:
    """Paragraphs; what a sentence cites is in brackets at its end, as keys of the bibliography."""
    shown = [name for name in dict.fromkeys(metrics) if name in CATALOGUE]
    paragraphs = [
        [*_runs(readings), *_capture(readings)],
        [*_slices(readings, view, shown, by)],
        [*_definitions(shown)],
        [
            *_verdicts(readings),
            *([f"Not drawn, being the same everywhere: {'; '.join(flat)}"] if flat else []),
        ],
    ]
    return [" ".join(f"{each}." for each in paragraph) for paragraph in paragraphs if paragraph]


def _runs(readings: Sequence[Reading]) -> Iterable[str]:
    version = f"with depthscope {depthscope_version()}"
    if len(readings) > MOST_NAMED:
        yield f"We measured {len(readings)} runs {version}; the table of runs lists them"
        return
    described = "; ".join(_described(reading) for reading in readings)
    yield f"We measured {len(readings)} run{'s' if len(readings) > 1 else ''} {version}: {described}"


def _described(reading: Reading) -> str:
    attrs, analysis = reading.attrs, reading.analysis
    streams = attrs.get("n_streams") or 1
    layers = int(analysis["layer"].max()) + 1 if "layer" in analysis.coords else 0
    parts = [
        f"model {shortened(str(attrs['model']), LONGEST_NAME)}" if attrs.get("model") else "",
        f"connections: {shortened(str(attrs['family']), LONGEST_NAME)}" if attrs.get("family") else "",
        f"{layers} layers" if layers else "",
        f"{streams} residual streams" if streams != 1 else "",
        _training_words(attrs),
    ]
    return f"{reading.name} ({', '.join(filter(None, parts))})"


def _training_words(attrs: Mapping[str, Any]) -> str:
    """How a run's model was trained, where its maker recorded it; of other runs a seed may be that of anything."""
    training = attrs.get("training")
    if not isinstance(training, Mapping):
        return ""
    seed = f" from seed {attrs['seed']}" if "seed" in attrs else ""
    return f"trained for {training['steps']} steps{seed}" if "steps" in training else ""


def _sample_words(attrs: Mapping[str, Any]) -> str:
    """How many of the sequences were stored, where it was not all of them."""
    sampling = attrs.get("sampling")
    if not isinstance(sampling, Mapping):
        return ""
    seen, kept = sampling.get("sequences_seen"), sampling.get("sequences_kept")
    if seen is None or kept is None or seen == kept:
        return ""
    return f"{kept} of {seen} sequences, drawn with seed {sampling['seed']}"


def _capture(readings: Sequence[Reading]) -> Iterable[str]:
    counts = {
        reading.name: float(reading.analysis["num_tokens"].sel(scope="data").max())
        for reading in readings
        if "num_tokens" in reading.analysis and "scope" in reading.analysis["num_tokens"].dims
    }
    counts = {run: count for run, count in counts.items() if math.isfinite(count)}
    if counts:
        tokens = " to ".join(f"{count:g}" for count in sorted({min(counts.values()), max(counts.values())}))
        yield (
            f"The residual state before the first block and after every step of a block was kept for {tokens} real tokens "
            f"of {_those(counts, readings)}; padding was left out"
        )
    samples = {reading.name: words for reading in readings if (words := _sample_words(reading.attrs))}
    if samples:
        listed = "; ".join(f"{run}: {words}" for run, words in samples.items())
        yield f"They are those of a uniform sample of the sequences ({listed})"
    yield from _same_data(readings)
    yield from _checked(readings)
    unproven = proof_sentence({reading.name: reading.attrs for reading in readings})
    if unproven:
        yield unproven


def _those(names: Collection[str], readings: Sequence[Reading]) -> str:
    """Some of the runs, as a phrase."""
    if len(names) == len(readings):
        return "every run" if len(readings) > 1 else "the run"
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} of the {len(readings)} runs"


def _same_data(readings: Sequence[Reading]) -> Iterable[str]:
    """Whether the runs have seen the same data; nothing of a run alone."""
    if len(readings) < 2:
        return
    digests = {reading.name: reading.attrs.get("data_digest") for reading in readings}
    unknown = [run for run, digest in digests.items() if digest is None]
    if len(set(digests.values()) - {None}) > 1:
        yield "The runs have not all seen the same data"
    elif unknown:
        yield f"What data {_those(unknown, readings)} have seen is not recorded"
    else:
        yield "All runs have seen the same data"


def _checked(readings: Sequence[Reading]) -> Iterable[str]:
    """Which way matrices act, and how large the error of recomputed states is, of the runs of which it is known."""
    known = {
        reading.name: float(error)
        for reading in readings
        if isinstance(error := reading.attrs.get("reconstruction_error"), int | float)
    }
    if not known:
        return
    yield (
        "H_res[i, j] carries stream j to stream i, and products have the later connection on the left; of "
        f"{_those(known, readings)} the next state was recomputed from the parts that were read (largest relative error "
        f"{number(max(known.values()))}) (xie2025mhc)"
    )
    open_runs = [reading.name for reading in readings if reading.attrs.get("orientation") == "ambiguous"]
    if open_runs:
        yield (
            f"Of {_those(open_runs, readings)} the states fit H_res and its transpose equally well: forward and backward "
            "may be exchanged there"
        )


def _slices(readings: Sequence[Reading], view: Selection, metrics: Sequence[str], by: str) -> Iterable[str]:
    dims = {
        str(dim)
        for reading in readings
        for name in metrics
        if name in reading.analysis
        for dim in reading.analysis[name].dims
    }
    words = versions_words(dims, view)
    if words:
        yield f"Unless a caption says otherwise, the text shows {words}"
    errors = [
        (reading.name, spoken(name), reading.analysis[f"{name}_stderr"])
        for reading in readings
        for name in metrics
        if f"{name}_stderr" in reading.analysis
    ]
    if intervals := interval_words(errors):
        jackknife = any("jackknife" in str(of.attrs.get("estimator", "")) for _, _, of in errors)
        how = "; from the jackknife where a metric is no mean over sequences" * jackknife
        yield f"An error, where a number has one, is {intervals}{how}"
    if any(any(f"{name}_null" in reading.analysis for reading in readings) for name in metrics):
        yield (
            "A noise baseline is what a metric would be without structure, at the same numbers of tokens and features"
        )
    if by:
        yield (
            f"Runs are grouped by {by}: curves are means over the runs of a group with their 95 % interval (Student's t), and "
            "groups are compared by exchanging the labels of their runs, corrected for the number of positions"
        )
    if view.axis == "relative":
        yield "Runs of different depth are compared at the same share of their depth"


def _definitions(metrics: Sequence[str]) -> Iterable[str]:
    """The metrics by the source of their definition: equations are there, and not repeated here."""
    by_source: dict[str, list[str]] = {}
    for name in metrics:
        by_source.setdefault("; ".join(keys_of([CATALOGUE[name].cite])), []).append(spoken(name))
    parts = [f"{', '.join(names)}{f' ({keys})' if keys else ''}" for keys, names in by_source.items()]
    if parts:
        yield f"The documentation of depthscope has the equations of the metrics: {'; '.join(parts)}"


def _verdicts(readings: Sequence[Reading]) -> Iterable[str]:
    # Notes too: their numbers have crossed a limit as well.
    found = [finding for reading in readings for finding in reading.findings]
    if found:
        yield (
            "Verdicts compare these numbers with fixed limits; the table of findings has each number that crossed one, with "
            "the limit and its source, which is depthscope itself where no publication states one"
        )
    elif any(reading.passed for reading in readings):
        yield "No number crossed the limit of a verdict"
