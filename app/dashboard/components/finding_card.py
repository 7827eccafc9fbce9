"""How is a finding shown? As the card that every face shows: verdict, where, why, next, and its equation one click away."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.text.cards import Card
from depthscope.app.text.explanations import explanation
from depthscope.diagnostics import Finding

__all__ = ["show_card", "tally"]

# A sign and a word with each colour: red and orange alone are the same to some readers.
BADGES = {
    "FAIL": ("failure", "red", "✕"),
    "WARN": ("warning", "orange", "▲"),
    "INFO": ("note", "blue", "●"),
}
"""Severity → word, colour, sign."""


def show_card(card: Card) -> None:
    """One finding in a bordered box.

    Parameters
    ----------
    card : Card
        Of `cards_of`.
    """
    word, colour, sign = BADGES[card.severity]
    with st.container(border=True, gap="xxsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.badge(f"{sign} {word}", color=colour)
            st.markdown(f"**{escaped(card.title)}**", width="content")
        st.caption(f"**Where:** {escaped(card.where)}")
        # Escaping comes last: names and keys contain underscores.
        st.markdown(f"**Why:** {escaped(' '.join(filter(None, (card.why, card.limit))))}")
        if card.unproven:
            st.caption(f"**Unproven:** {escaped(card.unproven)}")
        if card.next:
            st.caption(f"**Next:** {escaped(card.next)}")
        if card.experiment:
            st.code(card.experiment, language=None, wrap_lines=True)
        if card.result:
            st.caption(f"**Result:** {escaped(card.result)}")
        with st.popover("Equation and sources", type="tertiary"):
            st.code(explanation(card.finding.verdict), language=None, wrap_lines=True)


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
