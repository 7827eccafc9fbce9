"""Text as LaTeX: ASCII for every engine, other alphabets escaped, long words with places to break."""

from __future__ import annotations

import pytest

from depthscope.app.text.latex import tex


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ("naïve Ångström", r"na\"{\i}ve \r{A}ngstr\"{o}m"),
        ("łódź ß", r"\l{}\'{o}d\'{z} \ss{}"),
        ("“a” … «b»", r"``a'' \dots{} \guillemotleft{}b\guillemotright{}"),
        ("e\u0301", r"\'{e}"),
        ("ộ", r"\d{\^{o}}"),  # the mark below goes around: TeX sets one mark on a letter
        ("ố", r"\textbackslash{}u1ed1"),
        ("x模y", r"x\textbackslash{}u6a21y"),
    ],
)
def test_every_alphabet_is_ascii(plain, said):
    assert tex(plain) == said


def test_long_words_may_be_broken():
    longest = max(len(part) for part in tex("a" * 150).split(r"\allowbreak{}"))
    assert longest <= 18


def test_marks_of_direction_around_a_name_are_no_letters():
    assert tex("of \u2068a\u2069: 1") == "of a: 1"
