"""Text as LaTeX: ASCII for every engine, other alphabets as pictures, long words with places to break."""

from __future__ import annotations

import pytest

from depthscope.app.text.latex import pictured_words, tex


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ("naïve Ångström", r"na\"{\i}ve \r{A}ngstr\"{o}m"),
        ("łódź ß", r"\l{}\'{o}d\'{z} \ss{}"),
        ("“a” … «b»", r"``a'' \dots{} \guillemotleft{}b\guillemotright{}"),
        ("e\u0301", r"\'{e}"),
        ("ộ", r"\d{\^{o}}"),  # the mark below goes around: TeX sets one mark on a letter
        ("ố", r"\protect\depthscopeword{7889}\allowbreak{}"),
        ("мы", r"\protect\depthscopeword{1084-1099}\allowbreak{}"),
        ("模型", r"\protect\depthscopeword{27169}\allowbreak{}\protect\depthscopeword{22411}\allowbreak{}"),
        ("x模y", r"x\protect\depthscopeword{27169}\allowbreak{}y"),
    ],
)
def test_every_alphabet_is_ascii(plain, said):
    assert tex(plain) == said


def test_words_from_right_to_left_stay_together():
    code = tex("run שלום עולם end")
    (word,) = pictured_words([code]).values()
    assert word == "שלום עולם"


def test_names_of_pictures_fit_a_file_system():
    code = tex("\U0001f642" * 100 + "ש" * 100)
    assert max(map(len, pictured_words([code]))) < 200
    assert "".join(pictured_words([code]).values()).count("ש") >= 16


def test_long_words_may_be_broken():
    longest = max(len(part) for part in tex("a" * 150).split(r"\allowbreak{}"))
    assert longest <= 18


def test_without_pictures_letters_are_written_as_python_escapes_them():
    assert tex("模", words=False) == r"\textbackslash{}u6a21"


def test_marks_of_direction_around_a_name_are_no_letters():
    assert tex("of \u2068שלום\u2069: 1") == rf"of {tex('שלום')}: 1"
