"""What is wrong with this model, first? Findings in plain words, worst first, then the facts."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app.analyses import Reading
from app.figures import FIGURES
from app.figures.values import feeds
from app.views.chart import build, card
from app.views.desk import Desk, desk
from app.views.verdict import show_finding, tally
from app.views.words import plain

_GLANCE = ("effective_rank", "composite_gain", "token_cosine", "gradient_norm", "residual_norm")
_SHOWN = 6


def show() -> None:
    """The page."""
    found = desk()
    columns = (
        st.columns(len(found.readings))
        if len(found.readings) <= 3
        else [st.container() for _ in found.readings]
    )
    for column, reading in zip(columns, found.readings.values(), strict=True):
        with column:
            _headline(reading)
    _glance(found)
    for column, reading in zip(_beside(len(found.readings)), found.readings.values(), strict=True):
        with column:
            _findings(reading)
    st.subheader("Runs")
    for column, reading in zip(_beside(len(found.readings)), found.readings.values(), strict=True):
        with column:
            _facts(reading)


def _beside(count: int) -> list[Any]:
    """Columns for up to three runs, rows for more."""
    return list(st.columns(count)) if count <= 3 else [st.container() for _ in range(count)]


def _headline(reading: Reading) -> None:
    """The verdict of one run in one sentence."""
    worst = next(iter(reading.findings), None)
    st.caption(plain(reading.name))
    st.markdown(
        f"### {plain(worst.sentence)}" if worst else "### The signal passes: no metric crossed its threshold."
    )
    tally(reading.findings)


def _glance(found: Desk) -> None:
    """Two figures that carry most of the story."""
    analyses = found.analyses
    names = [name for name in _GLANCE if any(feeds(data, FIGURES[name].needs) for data in analyses.values())][
        :2
    ]
    for column, name in zip(_beside(len(names)), names, strict=True) if names else ():
        with column:
            card(build(FIGURES[name], analyses, {}), key=f"overview_{name}", height=280)


def _findings(reading: Reading) -> None:
    st.subheader(f"Findings · {plain(reading.name)}")
    if not reading.findings:
        st.markdown("No metric crossed its threshold.")
    for finding in reading.findings[:_SHOWN]:
        show_finding(finding)
    rest = reading.findings[_SHOWN:]
    if rest:
        with st.expander(f"{len(rest)} more"):
            for finding in rest:
                show_finding(finding)


def _facts(reading: Reading) -> None:
    """What is known about a run, and the proof that its connections are the ones that the model applies."""
    with st.container(border=True):
        st.markdown(f"**{plain(reading.name)}**")
        st.markdown("\n".join(f"- {name}: {plain(value)}" for name, value in _known(reading)))


def _known(reading: Reading) -> list[tuple[str, str]]:
    attrs = reading.attrs
    streams = attrs.get("n_streams")
    proof = attrs.get("reconstruction_error")
    facts = {
        "Model": attrs.get("model"),
        "Family": attrs.get("family"),
        "Streams": streams,
        "Depth": f"{reading.analysis.sizes['depth']} states" if "depth" in reading.analysis.sizes else None,
        "Tokens": _tokens(reading),
        "Connections reproduce the states to": None
        if proof is None
        else f"{float(proof):.1e} (relative error)",
        "Orientation": attrs.get("orientation"),
        "Precision": attrs.get("dtype"),
        "Loss": attrs.get("loss_reduction"),
        "Seed": attrs.get("seed"),
        "Commit": attrs.get("commit"),
        "Data": attrs.get("data_digest"),
        "Created": attrs.get("created"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", "not_applicable")]


def _tokens(reading: Reading) -> str | None:
    """How many tokens stand behind the pooled numbers."""
    if "num_tokens" not in reading.analysis:
        return None
    count = reading.analysis["num_tokens"].sel(scope="data", tokens="all").max()
    return f"{float(count):g}"


show()
