"""Is each term explained once, found in the texts that have it, and written in one way?"""

import re

import pytest

from depthscope.app.dashboard.components.controls import CONTROLS
from depthscope.app.dashboard.pages import PAGES
from depthscope.app.figures import FIGURES
from depthscope.app.text.glossary import GLOSSARY, help_on
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.verdicts import VERDICTS

SHOWN = [
    *(text for page in PAGES for text in (page.title, page.help)),
    *(text for control in CONTROLS.values() for text in (control.label, *control.words.values())),
    *(kind.title for kind in FIGURES.values()),
    *(metric.label for metric in CATALOGUE.values()),
    *(text for verdict in VERDICTS.values() for text in (verdict.title, verdict.advice)),
    *(entry.meaning for entry in GLOSSARY.values()),
]


def test_terms_are_found_with_their_plurals_and_forms_and_parts_of_others_are_not():
    found = help_on("Effective rank of connections, centred").split("\n\n")
    assert [line.partition("**:")[0] for line in found] == ["**connection", "**effective rank", "**centring"]
    assert help_on("relative depth").count("**") == 2
    assert help_on("Streamlit", "pre-H_reset") is None


@pytest.mark.parametrize("term", GLOSSARY)
def test_one_thing_has_one_spelling(term):
    for other in GLOSSARY[term].not_written:
        wrong = [text for text in SHOWN if re.search(rf"(?<![\w-]){other}(?![\w-])", text, re.IGNORECASE)]
        assert not wrong, f"{other!r} is written {term!r}: {wrong}"


def test_every_term_is_in_use_and_ends_a_sentence():
    shown = " ".join(SHOWN)
    for term, entry in GLOSSARY.items():
        assert entry.meaning.endswith((".", "?")), term
        assert term in help_on(term)
    assert help_on(shown).count("\n\n") > 10
