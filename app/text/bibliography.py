"""Which sources does an export rest on? Those that its metrics and verdicts name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

_START = re.compile(r"^@\w+\s*\{\s*([^,\s]+)\s*,", re.MULTILINE)


def bibliography() -> str:
    """The whole bibliography, as BibTeX.

    Returns
    -------
    str
    """
    return files("depthscope.diagnostics").joinpath("references.bib").read_text(encoding="utf-8")


def entries(text: str) -> dict[str, str]:
    """BibTeX entries by key.

    Parameters
    ----------
    text : str
        BibTeX.

    Returns
    -------
    dict of str to str
        In the order of the text; each ends with its closing brace.

    Examples
    --------
    >>> list(entries("@book{a2020, title={A {nested} one}}"))
    ['a2020']
    """
    return {match.group(1): text[match.start() : _end(text, match.end())] for match in _START.finditer(text)}


def _end(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"the BibTeX entry before {text[start : start + 40]!r} never closes its brace")


def keys_of(sources: Iterable[str]) -> list[str]:
    """Bibliography keys among sources, which may list several keys or be ``"heuristic"``.

    Parameters
    ----------
    sources : iterable of str
        Citations of metrics and verdicts.

    Returns
    -------
    list of str
        Sorted, once each.

    Examples
    --------
    >>> keys_of(["roy2007effective, garrido2023rankme", "heuristic"])
    ['garrido2023rankme', 'roy2007effective']
    """
    names = {name for source in sources for name in re.split(r"[,;\s]+", source) if name}
    return sorted(names & set(entries(bibliography())))


def sources_of(figure: object) -> tuple[str, ...]:
    """Sources of the laws that a figure draws beside its curves; a matrix draws none.

    Parameters
    ----------
    figure : Figure
        A specification.

    Returns
    -------
    tuple of str
    """
    return tuple(getattr(figure, "sources", ()))


def cut(keys: Iterable[str]) -> str:
    """The bibliography with these keys alone.

    Parameters
    ----------
    keys : iterable of str
        Keys of `bibliography`.

    Returns
    -------
    str
        BibTeX, in the order of the whole.

    Raises
    ------
    ValueError
        For a key that the bibliography lacks.
    """
    known = entries(bibliography())
    wanted = set(keys)
    if missing := sorted(wanted - set(known)):
        raise ValueError(
            f"references.bib lacks {', '.join(missing)}; add the entry or correct the metric's cite"
        )
    return "".join(f"{text}\n\n" for key, text in known.items() if key in wanted)


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


def without_tex(text: str) -> str:
    """BibTeX text without its braces, its one accent and its one formula.

    Parameters
    ----------
    text : str
        Such as ``"{RankMe}"``.

    Returns
    -------
    str
    """
    return text.replace(r"{\v{c}}", "č").replace("$\\alpha$", "α").replace("{", "").replace("}", "")


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
    first = without_tex(first).strip()
    many = {1: "", 2: f" & {names[-1].split(',')[0].split()[-1]}"}.get(len(names), " et al.")
    return f"{first}{many} {year.group(1)}"
