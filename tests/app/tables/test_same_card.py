"""Does every face show the same card in the same words: terminal, JSON, notebook, report, dashboard?"""

import html
import re

import pytest

from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.readings import read_paths
from depthscope.app.report.report import to_html
from depthscope.app.tables.findings import cards_of
from depthscope.app.text.cards import cards_text
from depthscope.app.text.notebook import card_html
from depthscope.diagnostics import create_run, save_run
from tests.app.dashboard.opening import open_page, words


@pytest.fixture(scope="module")
def reading(tmp_path_factory, mhc_run):
    """A run with several findings: equal tokens from depth 4 on, and gradients that vanish."""
    trace = mhc_run["trace"].to_dataset().load()
    states = trace["residual"].copy(deep=True)
    states.values[4:] = states.values[4:].mean(axis=2, keepdims=True)
    path = tmp_path_factory.mktemp("same") / "same.zarr.zip"
    save_run(create_run(trace.assign(residual=states), attrs=mhc_run.attrs), path)
    (found,), _ = read_paths([str(path)])
    return found


def plain(text: str) -> str:
    """Text without tags, and with every stretch of white space as one blank."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.mark.usefixtures("few_figures")
def test_every_face_shows_the_same_words(reading, monkeypatch):
    cards = cards_of(reading)
    # Of a run without its model nothing is settled, which is one step milder.
    assert any(card.severity == "WARN" for card in cards)
    assert any(card.curve for card in cards)
    # Wide, so that no part of a card is cut.
    terminal = plain(cards_text(cards, width=100_000))
    report = plain(to_html([reading]))
    monkeypatch.setattr(run_library, "_roots", [])
    page = plain(words(open_page("", [run_library.Path(reading.path)])))
    for card in cards:
        notebook = plain(card_html(card))
        document = card.as_dict()
        for part in ("title", "where", "why", "next", "curve"):
            text = plain(getattr(card, part))
            assert plain(document[part] or "") == text
            for face, shown in {
                "terminal": terminal, "report": report, "notebook": notebook, "dashboard": page,
            }.items():  # fmt: skip
                assert text in shown, (face, part, text)
        if card.follows:
            assert all(f"follows from {card.follows}" in face for face in (terminal, report, notebook, page))
