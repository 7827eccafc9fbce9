"""How is a table written down? As LaTeX with booktabs rules, as Markdown, as CSV."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.bibliography import keys_of

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
HEADING_WIDTH = 14
_CITED = re.compile(r"\((\w+)\)")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e(-?\d+)(?!\w)")


def tex(text: str) -> str:
    r"""Plain text as LaTeX: special signs escaped, signs and powers of ten set as mathematics.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str

    Examples
    --------
    >>> tex("a_b 3.2e-7 ± 1%")
    'a\\_b $3.2\\times10^{-7}$ $\\pm$ 1\\%'
    """
    signs = _SPECIAL | SIGNS
    escaped = "".join(signs.get(letter, letter) for letter in text)
    return _EXPONENT.sub(r"$\1\\times10^{\2}$", escaped)


def to_latex(table: Table, cites: Mapping[str, str]) -> str:
    """A table float with booktabs rules, never wider than the page.

    Parameters
    ----------
    table : Table
        What to write.
    cites : mapping of str to str
        Bibliography keys by metric.

    Returns
    -------
    str
        Needs the packages amsmath, booktabs and graphicx; ``table*`` spans both columns where there are two.
    """
    shown = pd.DataFrame(
        {column: [_cell(table, column, text) for text in cells] for column, cells in table.printed.items()}
    )
    shown.columns = pd.Index([_heading(str(column)) for column in table.printed])
    shape = "".join("p{0.42\\textwidth}" if name in table.wrapped else "l" for name in table.printed)
    body = shown.style.hide(axis="index").to_latex(hrules=True, column_format=shape)
    lines = [
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{tex(table.caption)}{_definitions(table, cites)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\footnotesize",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        body.rstrip() + "}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _cell(table: Table, column: object, text: str) -> str:
    keys = keys_of([text]) if column in table.cited else []
    if keys:
        return rf"\cite{{{','.join(keys)}}}"
    value, bracket, null = text.partition(" (null ")
    if table.stacked and bracket:
        return _stack([value, bracket[1:] + null], "t")
    return _CITED.sub(_cited, tex(text)) if column in table.wrapped else tex(text)


def _cited(match: re.Match[str]) -> str:
    keys = keys_of([match.group(1)])
    return rf"\cite{{{keys[0]}}}" if keys else match.group(0)


def _stack(lines: Sequence[str], anchor: str) -> str:
    stacked = r"\\".join(map(tex, lines))
    return rf"\begin{{tabular}}[{anchor}]{{@{{}}l@{{}}}}{stacked}\end{{tabular}}"


def _heading(column: str) -> str:
    """Words of a heading, stacked so that the column is no wider than its numbers."""
    lines = textwrap.wrap(column, HEADING_WIDTH, break_long_words=False)
    return tex(column) if len(lines) < 2 else _stack(lines, "b")


def _definitions(table: Table, cites: Mapping[str, str]) -> str:
    """The symbol of each metric and where it comes from."""
    defined = []
    for metric, symbol in table.symbols.items():
        keys = keys_of([cites.get(metric, "")])
        source = rf"~\cite{{{','.join(keys)}}}" if keys else ""
        defined.append(f"{tex(spoken(metric))} ${symbol}$" + source)
    return f" Symbols: {'; '.join(defined)}." if defined else ""


def to_markdown(table: Table) -> str:
    """A table in Markdown, its caption above.

    Parameters
    ----------
    table : Table
        What to write.

    Returns
    -------
    str
    """
    columns = [str(column) for column in table.printed.columns]
    rows = [columns, ["---"] * len(columns), *table.printed.astype(str).to_numpy().tolist()]
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join([f"**{table.title}.** {table.caption}", "", *lines]) + "\n"


def to_csv(table: Table) -> str:
    """The numbers of a table at full precision.

    Parameters
    ----------
    table : Table
        What to write.

    Returns
    -------
    str
        Empty cells are undefined.
    """
    return table.data.to_csv(index=False, lineterminator="\n")
