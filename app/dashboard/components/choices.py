"""How does a visitor choose one of some names, or a number? In a control that the address restores, whatever it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import streamlit as st

__all__ = ["choose_index", "choose_one"]


def choose_one(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    default: str | None = None,
    words: Callable[[str], str] = str,
    width: int = 240,
) -> str:
    """One of some names, in the URL under its key.

    ``options``: at least one; a single one is taken without asking.
    ``key``: of the control and in the URL.
    ``default``: chosen at first; the first option where it is None or no option.
    """
    # A name of other runs, or of a link: Streamlit raises for a value that is no option.
    if st.session_state.get(key) not in options:
        st.session_state.pop(key, None)
    if len(options) == 1:
        return options[0]
    index = options.index(default) if default is not None and default in options else 0
    return st.selectbox(
        label, options, index=index, format_func=words, key=key, bind="query-params", width=width
    )


def choose_index(label: str, last: int, key: str, *, default: int, width: int = 130) -> int:
    """An integer from 0 to the last one, in the URL under its key.

    ``key``: of the control and in the URL.
    """
    # Streamlit fails on an address with ?a=inf: the field then does not read the address, and its value leaves it.
    bound = re.fullmatch(r"\d{1,9}", st.query_params.get(key, "0")) is not None
    if not bound:
        del st.query_params[key]
    # A depth of a deeper run, or of a link to one: Streamlit raises for a value above the maximum.
    if st.session_state.get(key, default) > last:
        st.session_state[key] = last
    bind = "query-params" if bound else None
    return int(st.number_input(label, 0, last, min(default, last), key=key, bind=bind, width=width))
