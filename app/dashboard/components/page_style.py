"""How does a page look? Tighter margins than Streamlit's own; the theme itself is in the server's configuration."""

from __future__ import annotations

import streamlit as st

__all__ = ["apply_style", "heading"]

_CSS = """
<style>
[data-testid="stMainBlockContainer"] { padding: 2.6rem 2.8rem 4rem; max-width: 1500px; }
[data-testid="stSidebarHeader"] { height: 2.4rem; }
[data-testid="stCaptionContainer"] p { font-size: .8rem; line-height: 1.4; }
[data-testid="stNavSectionHeader"] { font-size: 1.15rem; font-weight: 650; letter-spacing: -.01em; }
h1, h2, h3, h4, h5 { letter-spacing: -.01em; }
</style>
"""


def apply_style() -> None:
    """Put the style sheet, which holds nothing from any run, on the page."""
    st.html(_CSS)


def heading(title: str, question: str) -> None:
    """Title of a page and the question that it answers.

    Parameters
    ----------
    title : str
        Short.
    question : str
        One sentence.
    """
    st.markdown(f"### {title}")
    st.caption(question)
