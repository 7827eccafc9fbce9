"""How does text from a run reach a page? As itself: Markdown that it may hold is switched off."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~$:])")


def plain(text: str) -> str:
    r"""Text that Markdown shows as it stands.

    Parameters
    ----------
    text : str
        Anything, such as the name of a run.

    Returns
    -------
    str

    Examples
    --------
    >>> plain("a_b *c*")
    'a\\_b \\*c\\*'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
