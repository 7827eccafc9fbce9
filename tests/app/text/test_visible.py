"""Is every character of a text seen, and does what was made visible once stay as it is?"""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from depthscope.app.tables.formats import csv_text
from depthscope.app.text.visible import shortened, visible, visible_name
from tests.app.hostile_text import TEXTS, mutated

CASES = TEXTS | mutated(seed=3, count=60)
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Isolates around right-to-left words, and what joins the parts of an emoji, have a meaning.
KEPT = set("\u2068\u2069\u200d")


def hidden(text: str) -> set[str]:
    return {letter for letter in text if unicodedata.category(letter) in HIDDEN} - KEPT


def test_nothing_is_hidden_and_a_second_time_changes_nothing():
    for case in CASES:
        for show in (visible, visible_name):
            shown = show(CASES[case])
            assert not hidden(shown)
            assert show(shown) == shown
            shown.encode("utf-8")


@given(st.text())
def test_any_text_is_seen(text):
    shown = visible(text)
    assert not hidden(shown)
    assert visible(shown) == shown
    assert shown.count("\u2068") == shown.count("\u2069") <= 1
    if text.isascii() and text.isprintable():
        assert shown == text


def test_names_that_look_the_same_differ():
    names = ["a b", "a  b", " a b", "a b ", "a\u00a0b", "a\u200bb", "ab", "a\tb", "a\nb", "a\u3164b"]
    assert len({visible_name(name) for name in names}) == len(names)
    assert all(visible_name(name).strip() for name in (" ", "   "))


def test_long_texts_say_how_long_they_are():
    assert len(shortened("x" * 10**6, 100)) < 150
    assert shortened("x" * 10**6, 100).endswith("(1000000 characters)")
    assert visible("\u202e" * 10**6, longest=10).count(r"\u202e") == 10


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    import csv
    import io

    import pandas as pd

    # pandas keeps no lone surrogate: readings have none.
    texts = [text.encode("utf-8", "ignore").decode() for text in CASES.values()]
    table = pd.DataFrame({"=run": texts, "gain": -0.25})
    rows = list(csv.reader(io.StringIO(csv_text(table))))
    assert len(rows) == len(CASES) + 1
    assert {row[1] for row in rows[1:]} == {"-0.25"}
    assert not [row[0] for row in rows if row[0].strip()[:1] in tuple("=+-@＝＋－＠")]
