"""Does the dashboard work in a real browser: no errors, no request outside, and clicks that lead where they say?"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from urllib.parse import urlencode

import numpy as np
import pytest

from depthscope.app.dashboard.pages import PAGES
from depthscope.app.dashboard.state import run_library
from depthscope.app.text.numbers import number
from depthscope.diagnostics import schema
from tests.app.dashboard.conftest import HOSTILE, NAMES
from tests.app.dashboard.serving import CHART, ROOT, Watch, wait_for

pytestmark = pytest.mark.browser


def heading(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('.depthscope-pane h2')?.textContent.startsWith(words)",
        arg=words,
        timeout=60_000,
    )


def test_every_page_draws_without_an_error_and_without_leaving_the_host(page, address):
    watch = Watch(page, address)
    for shown in PAGES:
        if shown.url_path == "training":  # these runs have one step each, see below
            continue
        page.goto(f"{address}/{shown.url_path}?runs=plain&runs=mhc")
        page.wait_for_selector(CHART if shown.url_path else ".depthscope-map tr[data-run]", timeout=60_000)
        page.wait_for_timeout(500)
        assert page.get_by_test_id("stException").count() == 0
        for chart in page.locator(".depthscope-chart").all():
            assert chart.get_attribute("role") == "figure"  # an image may have no buttons in it
            assert len(chart.get_attribute("aria-label")) > 20
            assert chart.get_attribute("tabindex") == "0"
    buttons = {button.get_attribute("data-title") for button in page.locator(".modebar-btn").all()}
    assert len(buttons) == 6
    assert not {title for title in buttons if "loud" in title or "Plotly" in title}
    assert watch.errors == []
    assert watch.outside == []


def test_a_click_on_the_map_opens_the_microscope_at_that_depth(page, address):
    page.goto(address)
    strip = page.locator(".depthscope-map tr[data-run=plain] .strip")
    strip.wait_for(timeout=60_000)
    box = strip.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.7 * box["height"])
    tip = page.locator(".depthscope-map .tip").inner_text()
    depth = int(tip.split(":")[0].removeprefix("depth "))
    assert depth > 0
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.7 * box["height"])
    heading(page, f"Depth {depth}:")
    panels = page.locator(".depthscope-microscope")
    # The cursor follows the mouse in the browser, before anything is sent; a click and the keys pin, and a link restores it.
    page.wait_for_selector(".depthscope-microscope .main-svg", timeout=60_000)
    box = panels.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 120)
    under = page.locator(".depthscope-microscope .cursor").get_attribute("data-depth")
    page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + 120)
    heading(page, f"Depth {under}:")
    panels.focus()
    page.keyboard.press("ArrowLeft")
    words = f"Depth {int(under) - 1}:"
    heading(page, words)
    # Not `page.url`, which hears of nothing while a test only waits. The pane is ahead of the address.
    href = "() => location.href"
    wait_for(lambda: f"pin={int(under) - 1}" in page.evaluate(href), 20)
    link = page.evaluate(href)
    page.goto(f"{address}/streams")
    page.goto(link)
    heading(page, words)


def test_the_map_is_walked_by_keys_and_marked_runs_are_compared(page, address):
    page.goto(address)
    rows = page.locator(".depthscope-map tr[data-run]")
    rows.first.wait_for(timeout=60_000)
    rows.first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.get_by_text("2 marked:").wait_for()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("heading", name="Compare and export").wait_for(timeout=60_000)


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
    }
    return found;
}"""
TEXT = """() => [document.body.innerText,
    ...[...document.querySelectorAll("[aria-label]")].map((element) => element.getAttribute("aria-label"))].join("\\n")"""


def test_hostile_names_and_attributes_are_text(page, address, runs_root, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [runs_root.resolve()])
    names = [name for name in run_library.list_runs() if name not in ("plain", "mhc")]
    assert len(names) == len(NAMES)
    watch = Watch(page, address)
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for path in ("", "compare"):
        page.goto(f"{address}/{path}?{urlencode([('runs', name) for name in names])}")
        page.wait_for_selector(CHART if path else ".depthscope-map tr[data-run]", timeout=120_000)
        page.get_by_test_id("stStatusWidget").wait_for(state="detached", timeout=120_000)
        closed = page.locator("details:not([open]) > summary").filter(has_text="About")
        while closed.count():
            closed.first.click()
        page.wait_for_timeout(1000)
        assert page.get_by_test_id("stException").count() == 0
        assert page.evaluate(FOREIGN) == []
        text = " ".join(page.evaluate(TEXT).split())
        assert not set("\u202a\u202d\u202e\u2066\u200b\u200e\ufeff\x00\x1b") & set(text)
        for name in names:
            assert " ".join(name.split()) in text, name
    for case, words in HOSTILE.items():  # among the attributes
        assert words in text, case
    assert page.evaluate("() => window.hostile") is None
    assert dialogs == []
    assert watch.errors == []
    assert watch.outside == []


def test_the_browser_writes_numbers_as_python_does(page):
    source = (ROOT / "app" / "dashboard" / "components" / "numbers.js").read_text(encoding="utf-8")
    draw = np.random.default_rng(0)
    values = [0.0, 1.0, -1.0, 9.996, 0.9996, 99999.4, 1e5, 1e-3, 9.999e-4, 4.42e-7, 1e6, 25409.0, 3e-12]
    values += list(draw.normal(size=300) * 10.0 ** draw.integers(-9, 9, 300))
    written = page.evaluate(f"(values) => {{ {source}; return values.map(digits); }}", values)
    assert written == [number(value) for value in values]
    special = page.evaluate(f"() => {{ {source}; return [null, NaN, Infinity, -Infinity].map(digits); }}")
    assert special == [number(value) for value in (np.nan, np.nan, np.inf, -np.inf)]


def test_zoom_and_pin_survive_while_another_process_writes(page, address, runs_root):
    place = runs_root / "growing"
    command = [sys.executable, "-m", "tests.app.dashboard.growing_run", str(place), "2000", "0.1"]
    writer = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for(lambda: (place / schema.LOG).exists(), 30)
        page.wait_for_timeout(1500)
        watch = Watch(page, address)
        page.goto(f"{address}/training?runs=growing&measures=residual_norm")
        page.wait_for_selector(".depthscope-training .main-svg", timeout=60_000)
        panels = page.locator(".depthscope-training")
        plot = "() => document.querySelector('.depthscope-training .plot')"
        last = f"{plot}._fullData.find((trace) => trace.type === 'heatmap').x.at(-1)"
        shown = f"{plot}._fullLayout.xaxis.range"
        where = "() => location.href"
        page.wait_for_timeout(2000)  # the page has found its places
        before = page.evaluate(last)
        wait_for(lambda: page.evaluate(last) > before, 30)
        box = panels.bounding_box()
        y = box["y"] + 60
        page.mouse.move(box["x"] + 0.35 * box["width"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], y, steps=5)
        page.mouse.up()
        wait_for(lambda: "zoom_training=" in page.evaluate(where), 30)
        zoomed = page.evaluate(shown)
        page.wait_for_timeout(800)  # else the two are a double click
        page.mouse.click(box["x"] + 0.5 * box["width"], y)
        wait_for(lambda: "step=" in page.evaluate(where), 30)
        pinned = page.locator(".depthscope-training .pin").get_attribute("data-depth")
        page.wait_for_timeout(2500)  # two beats
        assert page.evaluate(shown) == pytest.approx(zoomed)
        assert page.locator(".depthscope-training .pin").get_attribute("data-depth") == pinned
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        page.get_by_text("killed at step").wait_for(timeout=60_000)
        assert watch.errors == []
        assert watch.outside == []
    finally:
        writer.kill()
        writer.wait()
        shutil.rmtree(place, ignore_errors=True)
