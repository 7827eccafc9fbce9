"""What each further stream costs: the number of streams alone differs."""

from __future__ import annotations

import pytest

pytest.importorskip("hyper_connections")

from depthscope.app.cli.main import main
from depthscope.app.study.memory import COLUMNS, memory_over_streams, table_rows
from depthscope.app.study.recipe import Recipe
from depthscope.app.study.small_lm import Size


def test_more_streams_keep_more_by_formula_and_measured():
    recipe = Recipe(batch=2, length=8, size=Size(layers=2, width=16, heads=2))
    rows = memory_over_streams(recipe, (1, 2, 4))
    measured = [row["measured_kept_bytes"] for row in rows]
    assert measured == sorted(measured)
    assert [row["measured_tokens"] for row in rows] == [16] * 3
    # float32, four sublayers of width 16.
    assert [row.get("kept_bytes") for row in rows] == [None, 2 * 16 * 4 * 4, 4 * 16 * 4 * 4]
    # All that is kept for the streams is a part of what is kept at all.
    assert all(row["kept_bytes"] * 16 < row["measured_kept_bytes"] for row in rows[1:])
    table = table_rows(rows)
    assert [len(row) for row in table] == [len(COLUMNS)] * 3
    assert table[0][:4] == ["1", "1 ×", "1 ×", "–"]


def test_without_a_folder_the_study_says_what_to_do(capsys):
    assert main(["study"]) == 2
    assert "--out DIR" in capsys.readouterr().err
