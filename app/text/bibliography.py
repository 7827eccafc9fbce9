"""Who said it, and where? The entries of the package's bibliography: as BibTeX for a paper, as words for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from depthscope.diagnostics.errors import InputError

# Our keys read author, year, word (roy2007effective); sentences of verdicts carry them in this form.
_KEY = re.compile(r"\b[a-z]+\d{4}[a-z]+\b")


@dataclass(frozen=True)
class Reference:
    """One entry of the bibliography, in Unicode.

    ``key``: BibTeX key.
    ``surnames``: of the authors, in order.
    ``year, title``: as printed.
    ``eprint, doi``: identifiers; empty where the entry has none.
    """

    key: str
    surnames: tuple[str, ...]
    year: str
    title: str
    eprint: str = ""
    doi: str = ""

    @property
    def author_year(self) -> str:
        """Such as "Xie et al. 2025"."""
        # From three authors on "et al.", as author-year citation styles have it.
        authors = " & ".join(self.surnames) if len(self.surnames) < 3 else f"{self.surnames[0]} et al."
        return f"{authors} {self.year}"

    @property
    def url(self) -> str:
        """The preprint where there is one, since everybody can read it; else the DOI; else empty."""
        if self.eprint:
            return f"https://arxiv.org/abs/{self.eprint}"
        return f"https://doi.org/{self.doi}" if self.doi else ""


def bibliography() -> str:
    """The package's bibliography, as BibTeX."""
    return files("depthscope.diagnostics").joinpath("references.bib").read_text(encoding="utf-8")


def entries(text: str) -> dict[str, str]:
    """BibTeX entries by key.

    Returns: In the order of the text; each ends with its closing brace.

    Examples
    --------
    >>> list(entries("@book{a2020, title={A {nested} one}}"))
    ['a2020']
    """
    import bibtexparser  # here: `depthscope --help` must not wait for it

    # Without middleware, which would rewrite the entries: a paper gets them as we wrote them.
    library = bibtexparser.parse_string(text, parse_stack=[])
    if library.failed_blocks:
        start = " ".join(str(library.failed_blocks[0].raw)[:40].split())
        raise InputError(
            f"the BibTeX entry {start!r} never closes a brace, or has a key or a field twice; correct it"
        )
    return {entry.key: str(entry.raw) for entry in library.entries}


@cache
def _library() -> dict[str, str]:
    return entries(bibliography())


@cache
def reference(key: str) -> Reference:
    """An entry of the bibliography with its TeX decoded."""
    import bibtexparser
    from bibtexparser import middlewares

    # One entry at a time: decoding TeX takes a hundred times as long as parsing, and a page cites a few entries.
    # Decoding comes before the names are split, since it does not enter their parts.
    stack = [
        middlewares.RemoveEnclosingMiddleware(),
        middlewares.LatexDecodingMiddleware(keep_math_mode=False),
        middlewares.SeparateCoAuthors(),
        middlewares.SplitNameParts(),
    ]
    (entry,) = bibtexparser.parse_string(cut([key]), parse_stack=stack).entries
    fields = {name: field.value for name, field in entry.fields_dict.items()}
    return Reference(
        key,
        tuple(" ".join([*name.von, *name.last]) for name in fields["author"]),
        fields["year"],
        fields["title"],
        fields.get("eprint", ""),
        fields.get("doi", ""),
    )


def keys_of(sources: Iterable[str]) -> list[str]:
    """Bibliography keys among sources, which may list several keys or be ``"this project"``."""
    # Authors of metrics separate keys as they like: by commas, semicolons or spaces.
    names = {name for source in sources for name in re.split(r"[,;\s]+", source) if name}
    return sorted(names & set(_library()))


def cut(keys: Iterable[str]) -> str:
    """The bibliography with these keys alone, as BibTeX in its own order."""
    known = _library()
    wanted = set(keys)
    if missing := sorted(wanted - set(known)):
        raise InputError(
            f"references.bib lacks {', '.join(missing)}; add the entry or correct the metric's cite"
        )
    return "".join(f"{text}\n\n" for key, text in known.items() if key in wanted)


def source_words(source: str) -> str:
    """Where a threshold comes from, as people cite it; a key that the bibliography lacks stays as it is."""
    return "; ".join(cited(part.strip()) for part in source.split(","))


def cited(sentence: str, *, form: Callable[[Reference], str] = lambda found: found.author_year) -> str:
    """A sentence with the bibliography keys in it replaced, by author and year unless `form` writes something else."""
    return _KEY.sub(lambda key: form(reference(key[0])) if key[0] in _library() else key[0], sentence)
