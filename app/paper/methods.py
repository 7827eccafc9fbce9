"""What was measured, and how? Paragraphs for the methods of a paper, from the settings and the definitions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from depthscope.app.figures.build.captions import versions_words
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.provenance import depthscope_version
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.intervals import NamedError, interval_words
from depthscope.app.tables.tables import spoken
from depthscope.app.text.bibliography import keys_of, source_words
from depthscope.app.text.evidence import proof_sentence
from depthscope.app.text.latex import Latex, cite, tex
from depthscope.app.text.numbers import number, sentence
from depthscope.app.text.visible import LONGEST_NAME, shortened
from depthscope.diagnostics import CATALOGUE

MOST_NAMED = 4
"""Runs up to which the methods name each with what it is; of more the table of runs does."""

Sentence = tuple[str, tuple[str, ...], str]
"""Words, the bibliography keys after them, and a formula in TeX after its first word; both may be empty."""


def methods_latex(
    readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str
) -> list[Latex]:
    """The methods as LaTeX.

    ``view``: which version of the numbers is shown.
    ``by``: attribute by which runs are grouped; empty for none.
    """
    return [
        Latex(" ".join(map(_sentence_latex, paragraph)))
        for paragraph in _paragraphs(readings, view, metrics, by)
    ]


def methods_text(readings: Sequence[Reading], view: Selection, metrics: Iterable[str], by: str) -> str:
    """The methods as plain text, with authors and years."""
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
        [_definition(name, _has_null(readings, name)) for name in shown],
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


def _capture(readings: Sequence[Reading]) -> Iterable[Sentence]:
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
            f"of {_those(counts, readings)}; padding was left out",
            (),
            "",
        )
    samples = {reading.name: words for reading in readings if (words := _sample_words(reading.attrs))}
    if samples:
        listed = "; ".join(f"{run}: {words}" for run, words in samples.items())
        yield f"They are those of a uniform sample of the sequences ({listed})", (), ""
    yield from _same_data(readings)
    yield from _checked(readings)
    unproven = proof_sentence({reading.name: reading.attrs for reading in readings})
    if unproven:
        yield unproven, (), ""


def _those(names: Collection[str], readings: Sequence[Reading]) -> str:
    """Some of the runs, as a phrase."""
    if len(names) == len(readings):
        return "every run" if len(readings) > 1 else "the run"
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} of the {len(readings)} runs"


def _same_data(readings: Sequence[Reading]) -> Iterable[Sentence]:
    """Whether the runs have seen the same data; nothing of a run alone."""
    if len(readings) < 2:
        return
    digests = {reading.name: reading.attrs.get("data_digest") for reading in readings}
    unknown = [run for run, digest in digests.items() if digest is None]
    if len(set(digests.values()) - {None}) > 1:
        yield "The runs have not all seen the same data", (), ""
    elif unknown:
        yield f"What data {_those(unknown, readings)} have seen is not recorded", (), ""
    else:
        yield "All runs have seen the same data", (), ""


def _checked(readings: Sequence[Reading]) -> Iterable[Sentence]:
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
        f"{number(max(known.values()))})",
        ("xie2025mhc",),
        "",
    )
    open_runs = [reading.name for reading in readings if reading.attrs.get("orientation") == "ambiguous"]
    if open_runs:
        yield (
            f"Of {_those(open_runs, readings)} the states fit H_res and its transpose equally well: forward and backward "
            "may be exchanged there",
            (),
            "",
        )


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
    words = versions_words(dims, view)
    if words:
        yield f"Unless a caption says otherwise, the text shows {words}", (), ""
    errors = [
        NamedError(reading.name, spoken(name), reading.analysis[f"{name}_stderr"])
        for reading in readings
        for name in metrics
        if f"{name}_stderr" in reading.analysis
    ]
    if intervals := interval_words(errors):
        jackknife = any(
            "jackknife" in str(of.attrs.get("estimator", "")) for _, _, of in errors if of is not None
        )
        how = (
            "; that of a metric which is not a mean over sequences is from the jackknife over them"
            * jackknife
        )
        yield f"An error, where a number has one, is {intervals}{how}", (), ""
    if any(_has_null(readings, name) for name in metrics):
        yield (
            "A noise baseline is what a metric would be without structure, at the same numbers of tokens and features; the "
            "definition of each metric that has one says of what",
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


def _has_null(readings: Sequence[Reading], name: str) -> bool:
    return any(f"{name}_null" in reading.analysis for reading in readings)


# Of names that begin a description.
_CAPITALS = ("Amax",)


def _definition(name: str, has_null: bool) -> Sentence:
    metric = CATALOGUE[name]
    label = spoken(name)
    title, _, rest = metric.description.removesuffix(".").partition(":")
    # "Effective rank: effective rank, how many …" repeats itself.
    parts = [rest.strip() if title.casefold() == label.casefold() and rest else title, rest.strip()]
    meaning = ", ".join(dict.fromkeys(filter(None, parts)))
    if meaning[1:2].islower() and not meaning.startswith(_CAPITALS):
        meaning = meaning[0].lower() + meaning[1:]
    null = (metric.null.__doc__ or "").partition("\n")[0] if has_null and callable(metric.null) else ""
    null = null.removesuffix(".")
    null = null[0].lower() + null[1:] if null[1:2].islower() else null
    text = sentence([f"{label}: {meaning}", metric.estimator, f"noise baseline: {null}" if null else ""])
    return text, tuple(keys_of([metric.cite])), metric.symbol


def _verdicts(readings: Sequence[Reading]) -> Iterable[Sentence]:
    # Notes too: their numbers have crossed a limit as well.
    found = [finding for reading in readings for finding in reading.findings]
    if found:
        yield (
            "Verdicts compare these numbers with fixed limits; the table of findings has each number that crossed one, with "
            "the limit and its source, which is this project where no publication states one",
            tuple(keys_of(finding.source for finding in found)),
            "",
        )
    elif any(reading.passed for reading in readings):
        yield "No number crossed the limit of a verdict", (), ""
