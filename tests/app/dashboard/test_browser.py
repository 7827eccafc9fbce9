"""Does the dashboard work in a real browser: no errors, no request outside, clicks and links that restore the view?"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from depthscope.app.dashboard.pages import PAGES
from depthscope.app.text.numbers import number
from depthscope.diagnostics import save_run
from tests.app.dashboard.serving import CHART, ROOT, Watch, serving_process, status, wait_for

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory, residual_run, mhc_run) -> Path:
    root = tmp_path_factory.mktemp("served")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    return root


@pytest.fixture(scope="module")
def served(chromium, runs_root) -> Iterator[tuple[str, int]]:
    with serving_process(runs_root) as found:
        yield found


@pytest.fixture(scope="module")
def address(served) -> str:
    return served[0]


def href(page) -> str:
    # Not `page.url`, which hears of nothing while a test only waits.
    return page.evaluate("() => location.href")


def microscope_heading(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('.depthscope-pane h2')?.textContent.startsWith(words)",
        arg=words,
        timeout=60_000,
    )


def test_every_page_draws_without_an_error_and_without_leaving_the_host(page, address):
    watch = Watch(page, address)
    for shown in PAGES:
        if shown.url_path == "training":  # these runs have one step each, see test_training
            continue
        page.goto(f"{address}/{shown.url_path}")
        page.wait_for_selector(CHART, timeout=60_000)
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


def test_another_host_name_is_refused(address):
    port = urlsplit(address).port
    assert status(port, "/", host="evil.example") == 403
    assert status(port, "/", host=f"127.0.0.1:{port}") == 200
    assert status(port, "/depthscope/plotly/plotly.min.js") == 200
    assert status(port, "/depthscope/plotly/../__init__.py") in (400, 404)


def test_a_launch_in_another_process_answers_and_ends_with_it_however_it_ends(runs_root):
    code = (
        "import sys; from pathlib import Path; from depthscope.app.dashboard.server import launch; "
        "print(launch([Path(sys.argv[1])], open_browser=False, block=False), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(runs_root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        try:
            served = parent.stdout.readline().strip()
            port = urlsplit(served).port
            assert served == f"http://127.0.0.1:{port}"
            assert status(port, "/_stcore/health") == 200
            parent.kill()
        finally:
            parent.kill()
    wait_for(lambda: status(port, "/_stcore/health") == 0, 20)


def test_the_cursor_the_pin_the_keys_and_the_link(page, address):
    page.goto(f"{address}/microscope?runs=plain&pin=2")
    page.wait_for_selector(".depthscope-microscope .main-svg", timeout=60_000)
    microscope_heading(page, "Depth 2:")
    panels = page.locator(".depthscope-microscope")
    box = panels.bounding_box()
    # The cursor follows the mouse in the browser, before anything is sent.
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 120)
    under = page.locator(".depthscope-microscope .cursor").get_attribute("data-depth")
    assert under not in (None, "", "2")
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + 120)
    microscope_heading(page, f"Depth {under}:")
    panels.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    microscope_heading(page, f"Depth {int(under) - 2}:")
    page.keyboard.press("Shift+ArrowRight")
    microscope_heading(page, f"Depth {int(under) - 2} against depth {int(under) - 1}:")
    # The pane is ahead of the address, which the server writes.
    wait_for(lambda: f"pin={int(under) - 2}" in href(page) and f"against={int(under) - 1}" in href(page), 20)
    link = href(page)
    page.goto(f"{address}/collapse")
    page.goto(link)
    microscope_heading(page, f"Depth {int(under) - 2} against depth {int(under) - 1}:")
    panels.focus()
    page.keyboard.press("Escape")
    microscope_heading(page, f"Depth {int(under) - 2}:")


def test_the_browser_writes_numbers_as_python_does(page):
    source = (ROOT / "app" / "dashboard" / "components" / "numbers.js").read_text(encoding="utf-8")
    draw = np.random.default_rng(0)
    values = [0.0, 1.0, -1.0, 9.996, 0.9996, 99999.4, 1e5, 1e-3, 9.999e-4, 4.42e-7, 1e6, 25409.0, 3e-12]
    values += list(draw.normal(size=300) * 10.0 ** draw.integers(-9, 9, 300))
    written = page.evaluate(f"(values) => {{ {source}; return values.map(digits); }}", values)
    assert written == [number(value) for value in values]
    special = page.evaluate(f"() => {{ {source}; return [null, NaN, Infinity, -Infinity].map(digits); }}")
    assert special == [number(value) for value in (np.nan, np.nan, np.inf, -np.inf)]
