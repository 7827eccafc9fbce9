"""How is text written in LaTeX, and filled into a template or the page of a venue? Escaped, signs as mathematics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.visible import escape, visible
from depthscope.diagnostics.errors import InputError

# What pdfTeX cannot set from plain text; the rest of Unicode passes through.
SIGNS = {
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "∞": r"$\infty$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "‖": r"$\|$",
    "σ": r"$\sigma$",
    "δ": r"$\delta$",
    "λ": r"$\lambda$",
    "Σ": r"$\Sigma$",
    "Δ": r"$\Delta$",
    "α": r"$\alpha$",
    "μ": r"$\mu$",
    "π": r"$\pi$",
    "τ": r"$\tau$",
    "∂": r"$\partial$",
    "ᵀ": r"$^{\top}$",
    "ₙ": r"$_n$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "√": r"$\surd$",
    "⊥": r"$\perp$",
    "°": r"$^\circ$",
    "→": r"$\to$",
    "|": r"$|$",
    "<": "$<$",
    ">": "$>$",
    **{sign: f"$_{digit}$" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{sign: f"$^{digit}$" for digit, sign in zip((1, 2, 3), "¹²³", strict=True)},
}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "$": r"\symbol{36}",  # matplotlib would take the backslash from \$
    **{sign: "\\" + sign for sign in "&%#_{}"},
}
# Letters besides ASCII with one mark that every LaTeX since 2018 sets from UTF-8 in the encoding T1.
_LETTERS = frozenset("ßæÆøØłŁœŒđĐðÐþÞı“”‘’…—«»„§")
# Longer than most words: TeX would set a name of 150 letters beyond the margin. A heuristic of ours.
_LONGEST_UNBROKEN = 18
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e(-?)0*(\d+)(?!\w)")


class Latex(str):
    """LaTeX code: a template inserts it as it is, where it escapes any other text."""


def tex(text: str) -> Latex:
    r"""Plain text as LaTeX: special signs escaped, signs and powers of ten as mathematics.

    Letters that LaTeX may have no font for are written as Python escapes them.

    ``text``: any text; `Latex` is code already and comes back unchanged.

    Examples
    --------
    >>> tex("a_b 3.2e-07 ± 1%"), tex("naïve м 2")
    ('a\\_b $3.2\\times10^{-7}$ $\\pm$ 1\\%', 'naïve \\textbackslash{}u043c 2')
    """
    if isinstance(text, Latex):
        return text
    # A sentence has names in it that were isolated, for screens.
    plain = text.replace("\u2068", "").replace("\u2069", "")
    shown = unicodedata.normalize("NFC", visible(plain, lines=True))
    shown = "".join(letter if _has_a_font(letter) else escape(letter) for letter in shown)
    # A long word, such as a path, has places at which it may be broken at the end of a line.
    code, length = [], 0
    for letter in shown:
        length = 0 if letter.isspace() else length + 1
        code.append(_SPECIAL.get(letter) or SIGNS.get(letter, letter))
        if length >= _LONGEST_UNBROKEN and not letter.isdigit():
            code.append(r"\allowbreak{}")
            length = 0
    # After the escaping: an exponent has no special sign, and its dollars must not be escaped.
    return Latex(_EXPONENT.sub(r"$\1\\times10^{\2\3}$", "".join(code)))


def _has_a_font(letter: str) -> bool:
    marked = unicodedata.normalize("NFD", letter)
    is_marked = letter <= "\u017f" and len(marked) == 2 and marked[0].isascii() and marked[0].isalpha()
    return letter.isascii() or letter in SIGNS or letter in _LETTERS or is_marked


def cite(keys: Iterable[str]) -> Latex:
    """A citation of bibliography keys."""
    # In brackets: with natbib, which most venues load, \cite makes the authors part of the sentence.
    return Latex(rf"\citep{{{','.join(keys)}}}")


_KEYS_IN_BRACKETS = re.compile(r"\((\w+(?:; \w+)*)\)")


def with_citations(text: str) -> Latex:
    """A sentence whose keys in brackets, "(roy2007effective; xie2025mhc)", are citations."""
    # The keys before anything is escaped or broken.
    pieces, start = [], 0
    for found in _KEYS_IN_BRACKETS.finditer(text):
        if keys := keys_of(found[1].split("; ")):
            pieces += [tex(text[start : found.start()]), cite(keys)]
            start = found.end()
    return Latex("".join([*pieces, tex(text[start:])]))


CITEP = Latex("\\providecommand{\\citep}{\\cite}")
"""What a document without natbib needs before a citation."""


# A missing value is an error, never an empty place in somebody's paper.
_COMMON: dict[str, Any] = {
    "undefined": StrictUndefined,
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
}


def html_template(package: str, name: str, **filters: Any) -> Template:
    """A template of HTML; what is not `markupsafe.Markup` is escaped."""
    # `finalize` sees every value that is printed, before it is escaped; markup of our own comes as `Markup`.
    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value, lines=True),
        **_COMMON,
    )
    environment.filters.update(filters)
    return environment.from_string(_source(package, name))


def latex_template(package: str, name: str, **filters: Any) -> Template:
    """A template of LaTeX: ``<% for … %>``, ``<< value >>``; what is not `Latex` is escaped.

    The filter ``latex`` marks text as code: the output of a macro, a label, a formula; ``cite`` makes a citation.

    ``package, name``: import name of the package, and its file.
    ``**filters``: filters by their names in the template.
    """
    environment = Environment(
        # Jinja's own delimiters are groups and comments of LaTeX.
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        # Jinja's autoescape knows HTML only; `finalize` sees every value that is printed.
        finalize=lambda value: tex(value if isinstance(value, str) else str(value)),
        autoescape=False,
        **_COMMON,
    )
    environment.filters.update(cite=cite, latex=Latex, tex=tex, **filters)
    return environment.from_string(_source(package, name))


def _source(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


_INCH = 72.27  # TeX points


@dataclass(frozen=True)
class Venue:
    """The page of a venue.

    ``name``: key of `VENUES`.
    ``text, column``: inches across the text, and across one column; equal where there is one.
    ``height``: inches of text on a page, at most.
    ``body``: type size of the text in points.
    ``author_year``: whether its style loads natbib, which cites by authors and years.
    """

    name: str
    text: float
    column: float
    height: float
    body: int
    author_year: bool = False

    @property
    def two_columns(self) -> bool:
        """Whether the text is set in two columns."""
        return self.column < self.text

    @property
    def separation(self) -> float:
        """Inches between the columns."""
        return self.text - 2 * self.column if self.two_columns else 0.0


VENUES: dict[str, Venue] = {
    venue.name: venue
    for venue in (
        # The style files: icml2025.sty, neurips_2025.sty, iclr2025_conference.sty, acl.sty (16 cm across two columns of
        # 7.7 cm), cvpr.sty, IEEEtran.cls (516 pt and 252 pt). `plain` is an article on letter paper with margins of an inch.
        Venue("icml", 6.75, 3.25, 9.0, 10, author_year=True),
        Venue("neurips", 5.5, 5.5, 9.0, 10, author_year=True),
        Venue("iclr", 5.5, 5.5, 9.0, 10, author_year=True),
        Venue("acl", 16.0 / 2.54, 7.7 / 2.54, 24.7 / 2.54, 11, author_year=True),
        Venue("cvpr", 6.875, 3.25, 8.875, 10),
        Venue("ieee", 516 / _INCH, 252 / _INCH, 9.25, 10),
        Venue("plain", 6.5, 6.5, 9.0, 10),
    )
}
"""Venues by name."""


def venue_of(name: str) -> Venue:
    """A venue by its name."""
    if name not in VENUES:
        raise InputError(f"venue {name!r} is not known; expected {', '.join(VENUES)}")
    return VENUES[name]
