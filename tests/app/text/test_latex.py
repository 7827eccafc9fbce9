"""Text as LaTeX, and sizes of venues, against those that another library has collected from the style files."""

from __future__ import annotations

import os

import pytest

from depthscope.app.text.latex import VENUES, tex, venue_of

# tueplots has no ACL, IEEE or plain article; their sizes are those that the style files state, in their own units.
STATED = {
    "acl": (16.0 / 2.54, 7.7 / 2.54),
    "ieee": (516 / 72.27, 252 / 72.27),
    "plain": (8.5 - 2.0, 8.5 - 2.0),
}


@pytest.fixture
def figsizes():
    if not os.environ.get("CI"):
        pytest.importorskip("tueplots")
    from tueplots import figsizes

    return figsizes


def test_sizes_are_those_of_tueplots(figsizes):
    known = {
        "icml": (figsizes.icml2024_full, figsizes.icml2024_half),
        "cvpr": (figsizes.cvpr2024_full, figsizes.cvpr2024_half),
        "neurips": (figsizes.neurips2024, figsizes.neurips2024),
        "iclr": (figsizes.iclr2024, figsizes.iclr2024),
    }
    assert set(known) | set(STATED) == set(VENUES)
    for name, sizes in known.items():
        across = tuple(size()["figure.figsize"][0] for size in sizes)
        assert (VENUES[name].text, VENUES[name].column) == pytest.approx(across, abs=1e-3), name


@pytest.mark.parametrize("name", STATED)
def test_other_sizes_are_those_of_the_style_files(name):
    assert (VENUES[name].text, VENUES[name].column) == pytest.approx(STATED[name], abs=1e-3)


def test_an_unknown_venue_is_refused():
    with pytest.raises(ValueError, match="expected icml, neurips"):
        venue_of("nature")


# --- text: letters that every engine has, other alphabets escaped, long words with places to break


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
