"""How does text from a run get onto a page? Escaped: Markdown, HTML and links in it have no effect."""

from __future__ import annotations

import re

# Streamlit adds directives to Markdown: ":red[…]" and ":material/…:" begin with a colon, "$" is mathematics.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~$:])")


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is.

    Parameters
    ----------
    text : str
        Anything, such as the name of a run.

    Returns
    -------
    str
        In one line.

    Examples
    --------
    >>> escaped("a_b *c*")
    'a\\_b \\*c\\*'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def inside_sentence(title: str) -> str:
    """A title as it is written inside a sentence: its first letter small, but for an abbreviation.

    Parameters
    ----------
    title : str
        Such as the title of a figure.

    Returns
    -------
    str

    Examples
    --------
    >>> inside_sentence("Token cosine"), inside_sentence("CKA of every two depths")
    ('token cosine', 'CKA of every two depths')
    """
    return title if title[1:2].isupper() else f"{title[:1].lower()}{title[1:]}"
