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
# Marks over and under letters, which T1 fonts set on any letter.
_ACCENTS = {
    **{
        "\u0300": "`",
        "\u0301": "'",
        "\u0302": "^",
        "\u0303": "~",
        "\u0304": "=",
        "\u0306": "u",
        "\u0307": ".",
    },
    **{
        "\u0308": '"',
        "\u030a": "r",
        "\u030b": "H",
        "\u030c": "v",
        "\u0323": "d",
        "\u0327": "c",
        "\u0328": "k",
    },
}
_BELOW = frozenset("dck")
_LETTERS = {
    **{"ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}"},
    **{
        "œ": r"\oe{}",
        "Œ": r"\OE{}",
        "đ": r"\dj{}",
        "Đ": r"\DJ{}",
        "ð": r"\dh{}",
        "Ð": r"\DH{}",
        "þ": r"\th{}",
    },
    **{"Þ": r"\TH{}", "ı": r"\i{}", "“": "``", "”": "''", "‘": "`", "’": "'", "…": r"\dots{}", "—": "---"},
    **{
        "«": r"\guillemotleft{}",
        "»": r"\guillemotright{}",
        "„": r"\quotedblbase{}",
        "§": r"\S{}",
        "°": r"$^\circ$",
    },
}
# Longer than most words: TeX would set a name of 150 letters beyond the margin. A heuristic of ours.
_LONGEST_UNBROKEN = 18
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e(-?)0*(\d+)(?!\w)")


class Latex(str):
    """LaTeX code: a template inserts it as it is, where it escapes any other text."""


def tex(text: str) -> Latex:
    r"""Plain text as LaTeX in ASCII: special signs escaped, signs and powers of ten as mathematics, accents as commands.

    Every engine and encoding reads it in the same way; letters that LaTeX may have no font for are written as Python
    escapes them.

    ``text``: any text; `Latex` is code already and comes back unchanged.

    Examples
    --------
    >>> tex("a_b 3.2e-07 ± 1%"), tex("naïve"), tex("м 2")
    ('a\\_b $3.2\\times10^{-7}$ $\\pm$ 1\\%', 'na\\"{\\i}ve', '\\textbackslash{}u043c 2')
    """
    if isinstance(text, Latex):
        return text
    # A sentence has names in it that were isolated, for screens.
    plain = text.replace("\u2068", "").replace("\u2069", "")
    shown = unicodedata.normalize("NFC", visible(plain, lines=True))
    shown = "".join(escape(letter) if _is_foreign(letter) else letter for letter in shown)
    # After the escaping: an exponent has no special sign, and its dollars must not be escaped.
    return Latex(_EXPONENT.sub(r"$\1\\times10^{\2\3}$", _with_breaks(shown)))


def _with_breaks(text: str) -> str:
    """Letters as LaTeX, with places at which a long word, such as a path, may be broken at the end of a line."""
    code, length = [], 0
    for letter in text:
        length = 0 if letter.isspace() else length + 1
        code.append(_letter(letter))
        if length >= _LONGEST_UNBROKEN and not letter.isdigit():
            code.append(r"\allowbreak{}")
            length = 0
    return "".join(code)


def _letter(letter: str) -> str:
    if letter in _SPECIAL or letter in SIGNS:
        return _SPECIAL.get(letter) or SIGNS[letter]
    if letter.isascii():
        return letter
    return _LETTERS[letter] if letter in _LETTERS else _accented(letter)


def _accented(letter: str) -> str:
    """A letter with marks as commands on its ASCII letter; empty for any other."""
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if not (base.isascii() and base.isalpha() and marks and all(mark in _ACCENTS for mark in marks)):
        return ""
    above = [mark for mark in marks if _ACCENTS[mark] not in _BELOW]
    # TeX sets one mark on a letter; a second one would be set next to it. Marks below go around everything else.
    if len(above) > 1 or len(marks) - len(above) > 1:
        return ""
    code = rf"\{base}" if base in "ij" else base
    for mark in sorted(marks, key=lambda mark: _ACCENTS[mark] in _BELOW):
        code = rf"\{_ACCENTS[mark]}{{{code}}}"
    return code


def _is_foreign(letter: str) -> bool:
    return not (letter.isascii() or letter in SIGNS or letter in _LETTERS or _accented(letter))


def cite(keys: Iterable[str]) -> Latex:
    r"""A citation of bibliography keys.

    Examples
    --------
    >>> cite(["roy2007effective", "xie2025mhc"])
    '\\citep{roy2007effective,xie2025mhc}'
    """
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


def unicode_declarations() -> Latex:
    """Declarations that let pdfLaTeX set `SIGNS` where they come as Unicode, as in PGF figures."""
    # ASCII signs such as "<" are no Unicode characters to declare, and text such as "--" needs no mathematics.
    return Latex(
        "".join(
            rf"\DeclareUnicodeCharacter{{{ord(sign):04X}}}{{\ensuremath{{{code.strip('$')}}}}}" + "\n"
            for sign, code in SIGNS.items()
            if not sign.isascii() and code.startswith("$")
        )
    )
