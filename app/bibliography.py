"""Which sources does an export rest on? Those that its metrics and verdicts name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files

_START = re.compile(r"^@\w+\s*\{\s*([^,\s]+)\s*,", re.MULTILINE)


def bibliography() -> str:
    """The whole bibliography, as BibTeX.

    Returns
    -------
    str
    """
    return files("diagnostics").joinpath("references.bib").read_text(encoding="utf-8")


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
