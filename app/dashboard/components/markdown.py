"""How does text from a run get onto a page? Escaped: Markdown, HTML and links in it have no effect."""

from __future__ import annotations

import re
import string

from depthscope.app.text.visible import LONGEST_TEXT, visible

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
    return " ".join(_as_code(word) if _SEARCHED.search(word) else _backslashed(word) for word in words)


def _backslashed(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _as_code(word: str) -> str:
    return _backslashed(_ICON).join(_code(part) for part in word.split(_ICON))


def _code(text: str) -> str:
    """Inline code, between more backticks than it has in a row."""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Markdown takes one space off at each end, where a backtick of the text would join the fence.
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"
