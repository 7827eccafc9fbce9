"""How is a result sent around? As one HTML file: findings, figures, numbers, provenance."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import xarray as xr

from depthscope.app.drawing.matplotlib import to_svg
from depthscope.app.figures import Figure, Selection
from depthscope.app.paper.export import draw_all, shared_axis, tables_of
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.findings import count_words, findings_text, place_of
from depthscope.app.tables.formats import to_csv
from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.bibliography import bibliography, cited, entries, keys_of, sources_of
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE, Finding

__all__ = ["findings_text", "to_html", "write_report"]


def write_report(runs: Mapping[str, xr.DataTree], out: Path, *, view: Selection | None = None) -> Path:
    """Write the report of some runs; an earlier one is replaced only when the new one is whole.

    Parameters
    ----------
    runs : mapping of str to DataTree
        Runs by the names to print.
    out : Path
        HTML file.
    view : Selection, optional
        Which slice of the numbers figures and tables show.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        For no run, or a name that does not end in ``.html``.
    """
    out = Path(out)
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"a report is an HTML file; got {out.name!r}, expected such as report.html")
    text = to_html(read_runs(runs), view=view)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, out)
    return out


def to_html(readings: Sequence[Reading], *, view: Selection | None = None) -> str:
    """The report as one HTML document that asks nothing of any network.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    view : Selection, optional
        Slice.

    Returns
    -------
    str
    """
    view = shared_axis(view or Selection(), readings)
    figures, tables = draw_all(readings, view), tables_of(readings, view)
    summary, _, *others = tables
    names = ", ".join(reading.name for reading in readings)
    page = Template(files("depthscope.app.report").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=_safe(f"depthscope: {names}"),
        heading=_safe(names),
        lead=_safe(_lead(readings)),
        contents=_contents(figures),
        findings="".join(_run_findings(reading) for reading in readings),
        summary=_table(summary),
        figures="".join(_figure(figure) for figure in figures),
        tables="".join(_folded(table) for table in others),
        missing="".join(_missing(reading) for reading in readings) or "<p>Every metric was computed.</p>",
        sources=_sources(figures, tables, readings),
        provenance=_provenance(readings),
    )


def _safe(text: object) -> str:
    return html.escape(str(text), quote=True)


def _lead(readings: Sequence[Reading]) -> str:
    return " · ".join(f"{reading.name}: {count_words(reading.findings)}" for reading in readings)


def _contents(figures: Sequence[Figure]) -> str:
    links = (f'<li><a href="#{_safe(figure.name)}">{_safe(figure.title)}</a></li>' for figure in figures)
    return f"<ul>{''.join(links)}</ul>"


# --- findings


def _run_findings(reading: Reading) -> str:
    items = "".join(_finding(finding) for finding in reading.findings)
    body = (
        f'<ol class="findings">{items}</ol>'
        if items
        else "<p>Nothing found: no metric crossed its threshold.</p>"
    )
    facts = " · ".join(
        f"{name} {_safe(reading.attrs[key])}"
        for key, name in (
            ("model", "model"),
            ("family", "family"),
            ("n_streams", "streams"),
            ("dtype", "dtype"),
        )
        if reading.attrs.get(key) is not None
    )
    return f'<section><h3>{_safe(reading.name)}</h3><p class="facts">{facts}</p>{body}</section>'


def _finding(finding: Finding) -> str:
    severity = finding.severity.name.lower()
    source = "a heuristic" if finding.source == "heuristic" else finding.source
    measured = (
        f"{spoken(finding.metric)} {number(float(finding.value))}, "
        f"threshold {number(float(finding.threshold))} ({source})"
    )
    advice = f"<p><b>Try:</b> {_safe(finding.advice)}</p>" if finding.advice else ""
    return (
        f'<li class="{severity}"><p><span class="severity">{severity}</span> '
        f"<b>{_safe(spoken(finding.verdict))}</b>, {_safe(place_of(finding))}</p>"
        f"<p>{_safe(cited(finding.sentence))}</p>{advice}<p class='facts'>{_safe(measured)}</p></li>"
    )


# --- figures and tables


def _figure(figure: Figure) -> str:
    drawing = to_svg(figure, width="full")
    label = _safe(figure.alt or figure.title)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return (
        f'<figure id="{_safe(figure.name)}"><h3>{_safe(figure.title)}</h3>{drawing}'
        f"<figcaption>{_safe(figure.caption)}</figcaption></figure>"
    )


def _folded(table: Table) -> str:
    return f"<details><summary>{_safe(table.title)}</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_safe(column)}</th>' for column in table.printed.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>"
        for row in table.printed.to_numpy().tolist()
    )
    numbers = _safe(to_csv(table))
    return (
        f'<p class="facts">{_safe(table.caption)}</p><div class="wide"><table aria-label="{_safe(table.title)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<details><summary>The same as CSV, at full precision</summary><pre>{numbers}</pre></details>"
    )


def _missing(reading: Reading) -> str:
    """What is not in the report, and why."""
    items = "".join(
        f"<li>{_safe(', '.join(metrics))}: {_safe(reason)}</li>"
        for reason, metrics in reading.not_computed.items()
    )
    return f"<h3>{_safe(reading.name)}</h3><ul>{items}</ul>" if items else ""


# --- where it comes from


def _sources(figures: Sequence[Figure], tables: Sequence[Table], readings: Sequence[Reading]) -> str:
    metrics = {figure.metric for figure in figures} | {name for table in tables for name in table.metrics}
    verdicts = [finding.source for reading in readings for finding in reading.findings]
    laws = [key for figure in figures for key in sources_of(figure)]
    keys = keys_of([*(CATALOGUE[name].cite for name in metrics if name in CATALOGUE), *verdicts, *laws])
    known = entries(bibliography())
    return f"<pre>{_safe(chr(10).join(known[key] for key in keys))}</pre>"


def _provenance(readings: Sequence[Reading]) -> str:
    blocks = [_facts(reading.name, reading.attrs) for reading in readings]
    return "".join(blocks) + _facts("this report", software())


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_safe(key)}</th><td>{_safe(_told(value))}</td></tr>'
        for key, value in facts.items()
    )
    caption = f"<caption>{_safe(title)}</caption>"
    return f'<div class="wide"><table class="facts">{caption}<tbody>{rows}</tbody></table></div>'


def _told(value: Any) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
