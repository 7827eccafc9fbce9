"""How is a table written to a file? As LaTeX with booktabs rules, as CSV, as Parquet."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd

from depthscope.app.tables.latex_table import to_latex
from depthscope.app.tables.tables import Table
from depthscope.app.text.visible import visible

__all__ = ["csv_text", "to_csv", "to_latex", "to_parquet"]

_FORMULA_SIGNS = tuple("=+-@＝＋－＠")  # with the wide forms that spreadsheets of East Asia take too


def to_csv(table: Table) -> str:
    """The numbers of a table at full precision."""
    return csv_text(table.data)


def to_parquet(table: Table) -> bytes:
    """The numbers of a table at full precision, with their types.

    Returns: The same for the same numbers and the same pyarrow. A column of several types, such as a threshold that is
    missing in one row, is text where it is no number.
    """
    data = table.data.copy()
    for name in data.columns:
        # Arrow has one type a column.
        if data[name].dtype == object:
            data[name] = [None if value is None else str(value) for value in data[name]]
    buffer = io.BytesIO()
    data.to_parquet(buffer, index=False)
    return buffer.getvalue()


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV whose cells are values, also in a spreadsheet.

    Returns: Text that a spreadsheet would take for a formula has an apostrophe before it, as is customary; numbers,
    negative ones too, are unchanged.

    Examples
    --------
    >>> print(csv_text(pd.DataFrame({"run": ["=1+1", "a"], "gain": [-0.5, 1.0]})))
    run,gain
    '=1+1,-0.5
    a,1.0
    <BLANKLINE>
    """
    safe = table.rename(columns=_no_formula)
    # Numbers are left as they are: a large matrix has a million of them.
    words = safe.select_dtypes(exclude="number").columns
    safe[words] = safe[words].map(_no_formula)
    return safe.to_csv(index=False, lineterminator="\n")


def _no_formula(value: Any) -> Any:
    """A value whose text begins with no sign that starts a formula in a spreadsheet."""
    if not isinstance(value, str):
        return value
    shown = visible(value, lines=True)
    return f"'{shown}" if shown.lstrip()[:1] in _FORMULA_SIGNS else shown
