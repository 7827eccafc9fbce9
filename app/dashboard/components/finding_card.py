"""How is a finding shown? Severity, sentence, number, threshold, source, advice."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.tables.findings import place_of
from depthscope.app.text.bibliography import cited, source_words
from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding

__all__ = ["show_finding", "tally"]

# A sign and a word with each colour: red and orange alone are the same to some readers.
BADGES = {
    "FAIL": ("failure", "red", "✕"),
    "WARN": ("warning", "orange", "▲"),
    "INFO": ("note", "blue", "●"),
}
"""Severity → word, colour, sign."""


def show_finding(finding: Finding) -> None:
    """One finding in a bordered box.

    Parameters
    ----------
    finding : Finding
        One finding of `judge`.
    """
    word, colour, sign = BADGES[finding.severity.name]
    with st.container(border=True, gap="xxsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.badge(f"{sign} {word}", color=colour)
            st.markdown(f"**{escaped(finding.verdict.replace('_', ' ').capitalize())}**", width="content")
            st.caption(escaped(place_of(finding)), width="content")
        # `cited` replaces a bibliography key by author and year; escaping comes last, since keys contain underscores.
        st.markdown(escaped(cited(finding.sentence)))
        facts = (
            f"{finding.metric} {number(float(finding.value))} · threshold {number(float(finding.threshold))}"
        )
        st.caption(f"{escaped(facts)} · {escaped(source_words(finding.source))}")
        if finding.advice:
            st.caption(f"**Try:** {escaped(finding.advice)}")


def tally(findings: Sequence[Finding]) -> None:
    """Badges with the number of findings of each severity.

    Parameters
    ----------
    findings : sequence of Finding
        Findings of one run.
    """
    with st.container(horizontal=True, gap="small"):
        for severity, (word, colour, sign) in BADGES.items():
            count = sum(finding.severity.name == severity for finding in findings)
            if count:
                st.badge(f"{sign} {count} {word}{'s' if count > 1 else ''}", color=colour)
        if not findings:
            st.badge("✓ nothing found", color="green")
