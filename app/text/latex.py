"""How is plain text written in LaTeX? Special characters escaped, mathematical signs as mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterable

from depthscope.app.text.visible import visible

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
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e(-?\d+)(?!\w)")


class Latex(str):
    """LaTeX code: a template inserts it as it is, where it escapes any other text."""


def tex(text: str) -> Latex:
    r"""Plain text as LaTeX: special signs escaped, signs and powers of ten set as mathematics.

    Parameters
    ----------
    text : str
        Any text; `Latex` is code already and comes back unchanged.

    Returns
    -------
    Latex

    Examples
    --------
    >>> tex("a_b 3.2e-7 ± 1%")
    'a\\_b $3.2\\times10^{-7}$ $\\pm$ 1\\%'
    """
    if isinstance(text, Latex):
        return text
    signs = _SPECIAL | SIGNS
    escaped = "".join(signs.get(letter, letter) for letter in visible(text, lines=True))
    # After the escaping: an exponent has no special sign, and its dollars must not be escaped.
    return Latex(_EXPONENT.sub(r"$\1\\times10^{\2}$", escaped))


def cite(keys: Iterable[str]) -> Latex:
    r"""A citation of bibliography keys.

    Parameters
    ----------
    keys : iterable of str
        Keys, at least one.

    Returns
    -------
    Latex

    Examples
    --------
    >>> cite(["roy2007effective", "xie2025mhc"])
    '\\cite{roy2007effective,xie2025mhc}'
    """
    return Latex(rf"\cite{{{','.join(keys)}}}")


def unicode_declarations() -> Latex:
    """Declarations that let pdfLaTeX set `SIGNS` where they come as Unicode, as in PGF figures.

    Returns
    -------
    Latex
    """
    # ASCII signs such as "<" are no Unicode characters to declare, and text such as "--" needs no mathematics.
    return Latex(
        "".join(
            rf"\DeclareUnicodeCharacter{{{ord(sign):04X}}}{{\ensuremath{{{code.strip('$')}}}}}" + "\n"
            for sign, code in SIGNS.items()
            if not sign.isascii() and code.startswith("$")
        )
    )
