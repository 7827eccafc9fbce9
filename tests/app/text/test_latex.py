"""Text as LaTeX: letters that every engine has, other alphabets escaped, long words with places to break."""

from __future__ import annotations

import pytest

from depthscope.app.text.latex import tex


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ("naïve Ångström łódź ß", "naïve Ångström łódź ß"),
        ("e\u0301 “a” … «b»", "é “a” … «b»"),
        ("ố ħ", r"\textbackslash{}u1ed1 \textbackslash{}u0127"),
        ("x模y", r"x\textbackslash{}u6a21y"),
    ],
)
def test_letters_without_a_font_are_escaped(plain, said):
    assert tex(plain) == said


def test_long_words_may_be_broken():
    longest = max(len(part) for part in tex("a" * 150).split(r"\allowbreak{}"))
    assert longest <= 18


def test_marks_of_direction_around_a_name_are_no_letters():
    assert tex("of \u2068a\u2069: 1") == "of a: 1"
