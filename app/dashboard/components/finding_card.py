"""How is a finding shown? As the card that every face shows: verdict, where, why, next, and its equation one click away."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.state.chosen_runs import open_microscope
from depthscope.app.text.cards import Card, explanation
from depthscope.app.text.visible import LONGEST_TEXT, visible

# A sign and a word with each colour: red and orange alone are the same to some readers.
BADGES = {"FAIL": ("failure", "red", "✕"), "WARN": ("warning", "orange", "▲"), "INFO": ("note", "blue", "●")}
"""Severity → word, colour, sign."""


def show_card(card: Card, *, name: str, depth: int | None, runs: Sequence[str]) -> None:
    """One finding in a bordered box, with a button that opens the microscope there for the runs."""
    word, colour, sign = BADGES[card.severity]
    finding = card.finding
    key = f"{name}_{finding.verdict}_{finding.stream}_{finding.axis}_{finding.first}"
    with st.container(border=True, gap="xxsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.badge(f"{sign} {word}", color=colour)
            st.markdown(f"**{escaped(card.title)}**", width="content")
        explained = f", follows from {card.follows}" if card.follows else ""
        st.caption(f"**Where:** {escaped(card.where + explained)}")
        if card.curve:
            st.caption(f"**Curve:** {card.blocks} {escaped(card.curve)}")
        # Escaping comes last: names and keys contain underscores.
        st.markdown(f"**Why:** {escaped(' '.join(filter(None, (card.why, card.limit))))}")
        if card.unproven:
            st.caption(f"**Unproven:** {escaped(card.unproven)}")
        if card.next:
            st.caption(f"**Next:** {escaped(card.next)}")
        if card.experiment:
            st.code(visible(card.experiment), language=None, wrap_lines=True)
        if card.result:
            st.caption(f"**Result:** {escaped(card.result)}")
        with st.container(horizontal=True, gap="small"):
            with st.popover("Equation and sources", type="tertiary"):
                st.code(explanation(card.finding.verdict), language=None, wrap_lines=True)
            st.button(
                "Microscope" if depth is None else f"Microscope at depth {depth}",
                key=f"open_{key}",
                type="tertiary",
                on_click=open_microscope,
                args=(runs,),
                kwargs={"look_at": name, "depth": depth},
            )


# Every sign of ASCII that is no letter may have a backslash before it, and none has a meaning then: not "[" of links, "&" of
# entities, ":" of Streamlit's directives (":red[…]"), "$" of mathematics, nor "/", without which ":material/…:" is no icon.
_SPECIAL = re.compile(f"([{re.escape(string.punctuation)}])")

# After Markdown has been read, Streamlit searches the text itself for these, whether it had been escaped or not: addresses
# become links, signs of their own become arrows and dashes, and its logo an image. Code is the text that it leaves alone.
_SEARCHED = re.compile(r"https?://|www\.|@|:streamlit:|^(?:<?->?|<-|--|[<>~]=)$", re.IGNORECASE)
_ICON = ":material/"  # is replaced even inside code, but not with a backslash before the "/"


def escaped(text: object) -> str:
    r"""Text that Markdown shows as it is; a word that Streamlit would make a link or a picture of is shown as code.

    ``text``: anything, such as the name of a run.
    Returns: In one line, and at most about a page of it.

    Examples
    --------
    >>> escaped("a_b *c*"), escaped("see http://a.example")
    ('a\\_b \\*c\\*', 'see `http://a.example`')
    """
    words = visible(" ".join(str(text).split()), longest=LONGEST_TEXT).split(" ")
    return " ".join(
        _backslashed(_ICON).join(_code(part) for part in word.split(_ICON))
        if _SEARCHED.search(word)
        else _backslashed(word)
        for word in words
    )


def _backslashed(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _code(text: str) -> str:
    """Inline code, between more backticks than it has in a row."""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Markdown takes one space off at each end, where a backtick of the text would join the fence.
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"
