"""Which names does the address ask for? Several of a list that depends on the run, where Streamlit's own binding has none."""

# Streamlit binds a list to the address by the words that are shown; names are shorter, and stay when a title changes.

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit as st

__all__ = ["choose_names"]


def choose_names(
    label: str, options: Sequence[str], default: Sequence[str], *, key: str, words: dict[str, str], most: int
) -> list[str]:
    """Some of many names, in the address under their key.

    ``options, default``: names that there are, and those that are chosen at first.
    ``key``: of the field, and in the address.
    Returns: Those that are chosen; the default where none is.
    """
    known = set(options)
    asked = st.query_params.get_all(key)[: 2 * most] if key in st.query_params else []
    named = [name for name in dict.fromkeys(asked) if name in known][:most]
    if key not in st.session_state:
        st.session_state[key] = named or list(default)
    elif not set(st.session_state[key]) <= known:
        # Chosen for another run: Streamlit raises for a value that is no option.
        st.session_state[key] = [name for name in st.session_state[key] if name in known]
    if asked and not named:
        del st.query_params[key]
    st.multiselect(
        label,
        options,
        format_func=words.__getitem__,
        key=key,
        max_selections=most,
        on_change=partial(_put, key),
    )
    return list(st.session_state[key][:most]) or list(default)


def _put(key: str) -> None:
    st.query_params[key] = st.session_state[key]
