"""Whatever a run's names and attributes contain, the report has the elements of a harmless one and shows the text."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

import pytest
import xarray as xr

from depthscope.app.figures import FIGURES
from depthscope.app.paper import contents
from depthscope.app.readings.readings import read_runs
from depthscope.app.report.report import to_html
from depthscope.app.text.visible import LONGEST_TEXT, visible
from depthscope.diagnostics import analyze
from depthscope.diagnostics.schema import COMPLETE
from tests.app.hostile_text import TEXTS, mutated

CASES = TEXTS | mutated(seed=1, count=8)
INVISIBLE = set(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u200b\u200e\u200f\u2060\ufeff\u00ad\x00\x08\x1b\x7f\x85\u2028"
)


class Page(HTMLParser):
    """Elements with the names of their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.values: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements[tag, tuple(sorted(name for name, _ in attrs))] += 1
        self.values |= {value or "" for name, value in attrs if name in ("href", "src", "xlink:href")}

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(autouse=True)
def _few_figures(monkeypatch):
    """One figure instead of sixty: the page is what matters."""
    kinds = {"effective_rank": FIGURES["effective_rank"]}
    monkeypatch.setattr(contents, "available", lambda analyses: kinds)


@pytest.fixture(scope="module")
def run(make_run) -> xr.DataTree:
    """With its metrics, so that no test analyses it."""
    run = make_run("residual", layers=2, gradients=False, weights=False)
    nodes = {"/trace": run["trace"].to_dataset(), "/metrics": analyze(run).assign_attrs({COMPLETE: True})}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=run.attrs), **nodes})


def with_attributes(run: xr.DataTree, values: dict[str, object]) -> xr.DataTree:
    """The run with more attributes; its data are shared."""
    changed = run.copy(deep=False)
    changed.attrs = {**run.attrs, **values}
    return changed


def same_elements(hostile: Page, harmless: Page) -> None:
    # The drawing of a longer name has more strokes, in elements that a harmless drawing has too.
    drawn = {"path", "use", "g", "defs"}
    difference = (hostile.elements - harmless.elements) + (harmless.elements - hostile.elements)
    assert not {element for element in difference if element[0] not in drawn}
    assert {tag for tag, _ in difference} <= drawn
    # A longer legend may have a frame, which has a style.
    assert set(hostile.elements) <= {*harmless.elements, ("path", ("style",)), ("path", ("class",))}
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in hostile.values)
    assert not INVISIBLE & set("".join(hostile.words))


@pytest.fixture
def harmless_attributes(run) -> Page:
    values = {f"key {number}": f"value {number}" for number in range(2 * len(CASES))}
    return Page(to_html(read_runs({"plain": with_attributes(run, values)})))


def test_hostile_attributes_and_keys_are_text(run, harmless_attributes):
    texts = list(CASES.values())
    values = {f"key {number}": text for number, text in enumerate(texts)}
    # A key is a name: a huge one is no case of its own.
    values |= {f"{number} {text[:300]}": f"value {number}" for number, text in enumerate(texts)}
    page = Page(to_html(read_runs({"plain": with_attributes(run, values)})))
    same_elements(page, harmless_attributes)
    words = "".join(page.words)
    for case, text in CASES.items():
        assert visible(text, lines=True, longest=LONGEST_TEXT) in words, case


def test_hostile_run_names_are_text(run):
    chosen = {case: text[:300] for case, text in list(CASES.items())[::5] if text}
    harmless = Page(to_html(read_runs({f"run {number}": run for number in range(len(chosen))})))
    text = to_html(read_runs({f"{number} {name}": run for number, name in enumerate(chosen.values())}))
    page = Page(text)
    same_elements(page, harmless)
    text.encode("utf-8")  # a lone surrogate could not be written
    assert "javascript:" not in " ".join(page.values)
