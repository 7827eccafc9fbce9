"""How does text from a run reach a page? As itself: Markdown that it may hold is switched off."""

from __future__ import annotations

import re
from functools import cache

from app.bibliography import bibliography, entries

__all__ = ["cited", "plain", "source_words"]

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


def source_words(source: str) -> str:
    """Where a threshold comes from, as people cite it.

    Parameters
    ----------
    source : str
        Key of the bibliography, several joined by commas, or "heuristic".

    Returns
    -------
    str
        Such as "Xie et al. 2025"; the key itself where the bibliography does not hold it.
    """
    return "; ".join(_authors().get(key.strip(), key.strip()) for key in source.split(","))


def cited(sentence: str) -> str:
    """A sentence with the bibliography keys in it written out.

    Parameters
    ----------
    sentence : str
        Such as "… above 100 (xie2025mhc)".

    Returns
    -------
    str
        Such as "… above 100 (Xie et al. 2025)".
    """
    return re.sub(r"\b[a-z]+\d{4}[a-z]+\b", lambda match: _authors().get(match[0], match[0]), sentence)


@cache
def _authors() -> dict[str, str]:
    """Author and year of every entry of the bibliography."""
    return {key: _author_year(entry, key) for key, entry in entries(bibliography()).items()}


def _author_year(entry: str, key: str) -> str:
    author = re.search(r"author\s*=\s*[{\"](.+?)[}\"]\s*,", entry, re.DOTALL)
    year = re.search(r"year\s*=\s*[{\"]?(\d{4})", entry)
    if author is None or year is None:
        return key
    names = re.split(r"\s+and\s+", author.group(1))
    first = names[0].split(",")[0] if "," in names[0] else names[0].split()[-1]
    first = first.replace("{", "").replace("}", "").strip()
    many = {1: "", 2: f" & {names[-1].split(',')[0].split()[-1]}"}.get(len(names), " et al.")
    return f"{first}{many} {year.group(1)}"
