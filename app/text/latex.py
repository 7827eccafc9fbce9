"""How is plain text written in LaTeX? Special characters escaped, mathematical signs as mathematics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.visible import escape, visible

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
