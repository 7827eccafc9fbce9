"""What is wrong with this model, first? Findings in plain words, worst first, then the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.finding_card import show_finding, tally
from depthscope.app.dashboard.components.markdown import plain
from depthscope.app.dashboard.components.page_style import heading
from depthscope.app.dashboard.state.chosen_runs import Desk, desk
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.figures.build.values import feeds
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.tables import column_of
from depthscope.diagnostics import Finding

_GLANCE = ("effective_rank", "composite_gain", "cka", "gradient_norm", "residual_norm")
_BESIDE = 3
_DIGEST = 19  # "sha256:" and twelve digits


def show() -> None:
    """The page."""
    found = desk()
    readings = list(found.readings.values())
    heading(
        "Overview",
        "What happens to the signal on its way through depth, and where does it die, explode or collapse?",
    )
    if len(readings) == 1:
        _alone(readings[0])
    else:
        _beside(readings)
    _glance(found)
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown("##### Runs")
        with right, st.container(horizontal=True, horizontal_alignment="right"):
            _download(readings)
        st.table(_facts(readings), border="horizontal")


def _alone(reading: Reading) -> None:
    """One run: its worst findings beside each other."""
    _name(reading)
    worst = reading.findings[:_BESIDE]
    for column, finding in zip(st.columns(max(len(worst), 1)), worst or (None,), strict=True):
        with column:
            if finding is None:
                _passed()
            else:
                show_finding(finding)
    _rest(reading.findings[_BESIDE:])


def _beside(readings: list[Reading]) -> None:
    """Several runs: a column for each with its worst finding; below each other above three."""
    columns = st.columns(len(readings)) if len(readings) <= _BESIDE else [st.container() for _ in readings]
    for column, reading in zip(columns, readings, strict=True):
        with column:
            _name(reading)
            if reading.findings:
                show_finding(reading.findings[0])
                _rest(reading.findings[1:])
            else:
                _passed()


def _name(reading: Reading) -> None:
    """Name of a run and how much was found."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**{plain(reading.name)}**", width="content")
        tally(reading.findings)


def _passed() -> None:
    """Nothing was found."""
    with st.container(border=True):
        st.markdown("The signal passes: no metric crossed its threshold.")
        st.caption("The next pages show how far each one is from there.")


def _rest(rest: Sequence[Finding]) -> None:
    """Findings after the worst ones, folded."""
    if rest:
        with st.expander(f"{len(rest)} more"):
            for finding in rest:
                show_finding(finding)


def _glance(found: Desk) -> None:
    """The two figures that carry most of the story."""
    able = [
        name for name in _GLANCE if any(feeds(data, FIGURES[name].needs) for data in found.analyses.values())
    ]
    for column, name in zip(st.columns(2), able, strict=False):
        with column:
            card(build(FIGURES[name], found.analyses, {}), key=f"overview_{name}", runs=list(found.analyses))


def _download(readings: list[Reading]) -> None:
    """All findings of the chosen runs as CSV."""
    st.download_button(
        "Findings as CSV",
        findings_table(readings).data.to_csv(index=False).encode(),
        file_name="findings.csv",
        mime="text/csv",
        key="findings_csv",
        on_click="ignore",
        type="tertiary",
    )


def _facts(readings: list[Reading]) -> pd.DataFrame:
    """What is known about each run, a column for each; what no run knows is left out."""
    table = pd.DataFrame({plain(reading.name): _known(reading) for reading in readings})
    table = table[table.notna().any(axis=1)].fillna("–")
    return table.map(lambda value: plain(str(value)))


def _known(reading: Reading) -> dict[str, Any]:
    """Facts of one run, with the proof that its connections are the ones that the model applies."""
    attrs = reading.attrs
    proof = attrs.get("reconstruction_error")
    facts = {
        "Model": attrs.get("model"),
        "Family": attrs.get("family"),
        "Streams": attrs.get("n_streams"),
        "Depth": f"{reading.analysis.sizes['depth']} states" if "depth" in reading.analysis.sizes else None,
        "Tokens analysed": _tokens(reading),
        "Effective rank of the last state": _last(reading, "effective_rank", Selection(scope="data")),
        "… of every token, streamed": _last(reading, "streamed_effective_rank", Selection()),
        "Reconstruction proof": None if proof is None else f"states rebuilt to {float(proof):.1e}",
        "Orientation": None if proof is None else str(attrs.get("orientation", "unknown")).replace("_", " "),
        "Sites": _sites(attrs),
        "Changed outside connections": _outside(attrs.get("changes_outside")),
        "Precision": attrs.get("dtype"),
        "Loss reduction": attrs.get("loss_reduction"),
        "Seed": attrs.get("seed"),
        "Commit": attrs.get("commit"),
        "Data": _short(attrs.get("data_digest")),
        "Created": attrs.get("created"),
        "Software": _software(attrs.get("software")),
    }
    return {name: None if value in (None, "") else value for name, value in facts.items()}


def _short(digest: Any) -> str | None:
    """The head of a digest, which tells data apart; the run holds all of it."""
    text = str(digest or "")
    return f"{text[:_DIGEST]}…" if len(text) > _DIGEST else text or None


def _sites(attrs: Mapping[str, Any]) -> str | None:
    """How many of the expected sites fired; the run's coverage table names them."""
    expected = attrs.get("sites_expected")
    return None if expected is None else f"{attrs.get('sites_fired')} of {expected} expected fired"


def _outside(changes: Any) -> str | None:
    """Where something beside the connections changes the streams."""
    return ", ".join(f"before {c['module']} by {c['change']:.1%}" for c in changes or ()) or None


def _tokens(reading: Reading) -> str | None:
    """How many tokens stand behind the pooled numbers."""
    if "num_tokens" not in reading.analysis:
        return None
    count = reading.analysis["num_tokens"].sel(scope="data", tokens="all").max()
    return f"{float(count):g}"


def _last(reading: Reading, metric: str, view: Selection) -> str | None:
    """A metric at the last depth where it is defined, with its error and its null."""
    column = column_of(reading.analysis, metric, view)
    if column is None:
        return None
    at = int(np.flatnonzero(np.isfinite(column.value.values))[-1])
    where = "" if at == column.value.size - 1 else f", at depth {at}"
    return f"{column.text()[at]}{where}"


def _software(versions: Any) -> str | None:
    """Versions as "name version" words."""
    if not isinstance(versions, dict):
        return None if versions is None else str(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


show()
