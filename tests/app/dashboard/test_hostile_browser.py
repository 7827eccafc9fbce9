"""Names and attributes that attack the page, in a real browser: shown as text, nothing runs, nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
import xarray as xr

from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.readings import COMPLETE
from depthscope.diagnostics import analyze, save_run
from tests.app.dashboard.serving import CHART, Watch, serving
from tests.app.hostile_text import TEXTS, file_names, mutated

pytestmark = pytest.mark.browser

EVERY = TEXTS | mutated(seed=6, count=6)
ASKED = ("url", "markdown_link", "directive", "entities", "arrows", "math", "plotly")
CASES = {case: EVERY[case] for case in (*ASKED, *[case for case in EVERY if case not in ASKED][:7])}
NAMES = file_names(CASES)

FOREIGN = """() => {
    const own = (url) => !url || new URL(url, location.href).origin === location.origin || /^(data|blob):/.test(url);
    const found = [];
    for (const element of document.querySelectorAll("*")) {
        const tag = element.tagName.toLowerCase();
        if (["iframe", "object", "embed", "base", "form", "frame", "applet", "portal"].includes(tag)) found.push(tag);
        for (const {name, value} of element.attributes) {
            if (/^on/i.test(name)) found.push(`${tag} ${name}`);
            if (/^\\s*javascript:/i.test(value)) found.push(`${tag} ${name}=${value}`);
        }
        for (const name of ["src", "href", "action", "data", "srcset", "poster"]) {
            const value = element.getAttribute(name) ?? element.getAttribute("xlink:" + name);
            if (value !== null && !own(value)) found.push(`${tag} ${name}=${value}`);
        }
        // Streamlit puts a link to itself, with an icon, beside each heading; ours are h3, h5, and h1 and h2 that are alone.
        const heading = element.closest("h1, h2");
        const around = heading && heading.closest("[data-testid=stMarkdownContainer]");
        if (around && around.textContent.trim() === heading.textContent.trim()) continue;
        if (element.closest("h3, h5, nav, [data-testid=stSidebarNav], svg.main-svg")) continue;
        if (tag === "a" && !element.matches("[data-testid=stSkipToContent]"))
            found.push(`a ${element.outerHTML.slice(0, 200)}`);
        // The sign of a tooltip, which is Streamlit's own.
        if (element.closest("[data-testid=stTooltipIcon], [data-testid=stTooltipHoverTarget]")) continue;
        const inserted = ":is(img, svg, video, audio, table, h1, h2, .katex, math, style)";
        if (element.matches(`[data-testid=stMarkdownContainer] ${inserted}`))
            found.push(`${tag} inside text: ${element.outerHTML.slice(0, 200)}`);
    }
    return found;
}"""
TEXT = """() => [document.body.innerText,
    ...[...document.querySelectorAll("[aria-label]")].map((element) => element.getAttribute("aria-label"))].join("\\n")"""
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u200b\u200e\u200f\u2060\ufeff\x00\x1b")


@pytest.fixture(scope="module")
def hostile_root(tmp_path_factory, make_run) -> Path:
    """A run a name, with the text of its case in the attributes that the page shows."""
    root = tmp_path_factory.mktemp("hostile")
    plain = make_run("residual", layers=2, weights=False)
    # A few metrics and no trace: a run opens at once.
    metrics = analyze(
        plain, metrics=["effective_rank", "cka", "residual_norm", "gradient_norm", "num_tokens"]
    )
    for case, name in NAMES.items():
        nodes = {"/": xr.Dataset(attrs=plain.attrs), "/metrics": metrics.assign_attrs({COMPLETE: True})}
        run = xr.DataTree.from_dict(nodes)
        text = CASES[case].replace("\x00", "").encode("utf-8", "ignore").decode()
        for key in ("model", "commit", "created", "data_digest", "software"):
            run.attrs[key] = text
        save_run(run, root / "run.zarr.zip")
        (root / "run.zarr.zip").rename(root / f"{name}.zarr.zip")
    return root


@pytest.fixture(scope="module")
def hostile_address(chromium, hostile_root) -> Iterator[str]:
    with serving(hostile_root) as served:
        yield served


@pytest.fixture(scope="module")
def shown_names(hostile_root) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_library, "_roots", [hostile_root.resolve()])
        return list(run_library.list_runs())


def look(page, address: str, path: str, names: list[str]) -> str:
    """Open a page on some runs, look for anything foreign, and return its text."""
    watch = Watch(page, address)
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"{address}/{path}?{urlencode([('runs', name) for name in names])}")
    if path not in ("mixing", "tokens"):
        page.wait_for_selector(CHART, timeout=120_000)
    page.get_by_test_id("stStatusWidget").wait_for(state="detached", timeout=120_000)
    page.wait_for_timeout(1000)
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate(FOREIGN) == []
    assert page.evaluate("() => window.hostile") is None
    assert dialogs == []
    assert watch.errors == []
    assert watch.outside == []
    text = page.evaluate(TEXT)
    assert not TURNING & set(text)
    return text


def test_hostile_names_attributes_and_parameters_are_text(page, hostile_address, shown_names):
    assert len(shown_names) == len(NAMES)
    text = " ".join(look(page, hostile_address, "", shown_names).split())
    for name in shown_names:
        assert " ".join(name.split()) in text, name
    for case in ASKED[:-1]:  # in the table of facts
        assert CASES[case] in text, case
    name = next(name for name in shown_names if name.startswith("<b>bold"))
    # In the legend that all charts of the page share.
    assert "<b>bold<∕b>" in look(page, hostile_address, "collapse", [name, shown_names[0]])
    text = CASES["markdown_link"]
    page.goto(
        f"{hostile_address}/similarity?{urlencode([(name, text) for name in ('runs', 'part', 'axis')])}"
    )
    page.get_by_text("No run is chosen").or_(page.locator(CHART).first).first.wait_for(timeout=120_000)
    assert page.evaluate(FOREIGN) == []
