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


def within(title: str) -> str:
    """A title as it stands within a sentence: its first letter small, but for an abbreviation.

    Parameters
    ----------
    title : str
        Such as the title of a figure.

    Returns
    -------
    str

    Examples
    --------
    >>> within("Token cosine"), within("CKA of every two depths")
    ('token cosine', 'CKA of every two depths')
    """
    return title if title[1:2].isupper() else f"{title[:1].lower()}{title[1:]}"
