"""Does the dashboard work in a real browser: no errors, no request outside, clicks and links that restore the view?"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from depthscope.app.dashboard.pages import PAGES
from depthscope.app.figures import FIGURES
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.diagnostics import save_run
from tests.app.dashboard.serving import CHART, ROOT, Watch, serving_process, status, wait_for
from tests.app.dashboard.walking import (
    BOARD,
    MICROSCOPE,
    PINNED,
    RANGE,
    drag,
    href,
    judged,
    microscope_heading,
    open_microscope,
)

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


HEAT_MAP = """[...document.querySelectorAll(".depthscope-chart")]
    .find((box) => box._fullData?.some((trace) => trace.type === "heatmap"))"""


def click_cell(page, column: int, row: int) -> None:
    """Click the cell of the first heat map of the page."""
    page.wait_for_function(f"() => {HEAT_MAP}", timeout=60_000)
    place = page.evaluate(
        f"""([column, row]) => {{
            const box = {HEAT_MAP};
            box.scrollIntoView({{block: "center"}});
            const area = box.querySelector(".nsewdrag").getBoundingClientRect();
            const {{xaxis, yaxis}} = box._fullLayout;
            return [area.x + xaxis.d2p(column), area.y + yaxis.d2p(row)];
        }}""",
        [column, row],
    )
    page.mouse.move(place[0] - 3, place[1] - 3)
    page.mouse.move(*place)
    page.wait_for_timeout(400)
    page.mouse.down()
    page.mouse.up()


def test_a_click_on_a_cell_opens_the_pair_and_puts_it_in_the_url(page, address):
    page.goto(f"{address}/similarity?runs=mhc")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1000)
    click_cell(page, 9, 4)
    page.get_by_text("Depth 4 against depth 9").wait_for(timeout=20_000)
    wait_for(lambda: "a=4" in page.url and "b=9" in page.url, 10)
    assert "runs=mhc" in page.url


def test_a_click_on_the_map_of_differences_opens_its_measure_at_its_place(page, address):
    page.goto(f"{address}/compare?runs=plain&runs=mhc")
    page.wait_for_function(f"() => {HEAT_MAP}", timeout=60_000)
    page.get_by_text("95 % interval").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    for column, row in ((3, 2), (1, 5)):
        name = page.evaluate(f"row => {HEAT_MAP}._fullLayout.yaxis.ticktext[row]", row)
        click_cell(page, column, row)
        wait_for(lambda at=column: f"compare_at={at}" in href(page), 20)
        (title,) = parse_qs(urlsplit(href(page)).query)["measure_of"]
        assert name in {spoken(kind.metric) for kind in FIGURES.values() if kind.title == title}
        page.get_by_text(f"Difference: {title}").first.wait_for(timeout=20_000)
        assert page.get_by_test_id("stException").count() == 0
    assert page.locator("table td", has_text="depth 1").count() >= 1


def test_a_link_restores_the_view(page, address):
    page.goto(f"{address}/similarity?runs=plain&a=2&b=5&estimator=biased")
    page.get_by_text("Depth 2 against depth 5").wait_for(timeout=60_000)
    page.wait_for_selector(CHART, timeout=60_000)
    assert page.get_by_label("Depth a").input_value() == "2"
    label = page.locator(".depthscope-chart").first.get_attribute("aria-label")
    assert "of plain" in label
    assert page.get_by_role("radio", name="biased", exact=True).get_attribute("aria-checked") == "true"


def test_zoom_survives_a_change_of_the_data(page, address):
    page.goto(f"{address}/collapse?runs=plain")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1000)
    read = "() => document.querySelector('.depthscope-chart').layout.xaxis.range.map((v) => Math.round(v * 100) / 100)"
    zoom = (
        "() => window.Plotly.relayout(document.querySelector('.depthscope-chart'), {'xaxis.range': [1, 3]})"
    )
    lines = "() => Array.from(document.querySelector('.depthscope-chart')._fullData.find((t) => t.name === 'plain').y)"
    before = page.evaluate(lines)
    assert len(before) == 7
    page.evaluate(zoom)
    page.get_by_text("over all data").click()
    wait_for(lambda: page.evaluate(lines) != before, 20)
    assert page.evaluate(read) == [1, 3]


def test_the_address_has_the_zoom_and_another_axis_never_leaves_a_chart_empty(page, address):
    page.goto(f"{address}/collapse?runs=plain&zoom_version_raw=1,3,,")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1500)
    read = "() => document.querySelector('.depthscope-chart')._fullLayout.xaxis.range"
    assert page.evaluate(read) == [1, 3]
    page.get_by_text("relative").first.click()
    wait_for(lambda: page.evaluate(read)[1] < 1.5, 20)
    assert page.evaluate(read)[0] < 0.1
    wait_for(lambda: "zoom_version" not in page.evaluate("() => location.href"), 10)


def test_a_key_goes_to_the_next_chart_and_arrows_to_its_cells(page, address):
    page.goto(f"{address}/similarity?runs=mhc")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1500)
    page.keyboard.press("g")
    assert "depthscope-chart" in page.evaluate("() => document.activeElement.className")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    page.get_by_text("Depth 1 against depth 2").wait_for(timeout=20_000)


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


def test_a_click_in_the_table_of_runs_opens_the_microscope_there(page, address):
    watch = Watch(page, address)
    page.goto(f"{address}/")
    judged(page)
    page.locator(f"{BOARD} .worst button").first.click()
    page.wait_for_url("**/microscope**", timeout=60_000)
    page.wait_for_selector(".depthscope-microscope .main-svg", timeout=60_000)
    page.wait_for_timeout(3000)  # the page writes its parameters
    page.go_back()
    page.get_by_role("heading", name="Runs", exact=True, level=1).wait_for(timeout=60_000)
    assert watch.errors == []
    assert watch.outside == []


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


def test_the_keyboard_reaches_a_chart_and_its_points(page, address):
    watch = Watch(page, address)
    page.goto(f"{address}/similarity?runs=mhc")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1000)
    # The first stop of the Tab key leads to the first chart.
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the charts"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.className").startswith("depthscope-chart")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    said = page.locator(".depthscope-said").first.text_content()
    assert said.startswith("column 2, row 2: ")
    page.keyboard.press("Enter")
    page.get_by_text("Depth 2 against depth 2").wait_for(timeout=20_000)
    assert watch.errors == []
    assert watch.outside == []


def test_a_zoom_of_the_microscope_is_in_the_address_survives_a_pin_and_is_restored(page, address):
    open_microscope(page, address)
    whole = page.evaluate(RANGE)
    drag(page, 0.2, 0.6)
    wait_for(lambda: page.evaluate(RANGE)[1] < whole[1] - 1, 10)
    zoomed = page.evaluate(RANGE)
    wait_for(lambda: "zoom_microscope=" in href(page), 10)
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2500)  # the server has answered, and Streamlit has written the address anew
    assert page.evaluate(RANGE) == pytest.approx(zoomed, abs=1e-6)
    link = href(page)
    assert "zoom_microscope=" in link
    page.goto(link)
    page.wait_for_selector(f"{MICROSCOPE} .main-svg", timeout=60_000)
    wait_for(lambda: page.evaluate(RANGE) == pytest.approx(zoomed, abs=1e-4), 20)
    page.locator(f"{MICROSCOPE} .nsewdrag").first.dblclick()
    wait_for(lambda: page.evaluate(RANGE) == pytest.approx(whole), 10)
    wait_for(lambda: "zoom_microscope" not in href(page), 10)


def test_after_a_click_in_a_panel_the_arrow_keys_move_the_pin(page, address):
    open_microscope(page, address)
    area = page.locator(f"{MICROSCOPE} .nsewdrag").first.bounding_box()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
    page.wait_for_timeout(300)
    page.mouse.down()
    page.mouse.up()
    wait_for(lambda: "pin=" in href(page), 30)
    pinned = int(page.evaluate(PINNED))
    page.keyboard.press("ArrowRight")
    wait_for(lambda: page.evaluate(PINNED) == str(pinned + 1), 5)
    wait_for(lambda: f"pin={pinned + 1}" in href(page), 10)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for(lambda: f"pin={pinned - 1}" in href(page), 10)


def test_after_a_click_in_a_chart_the_arrow_keys_go_on_from_there(page, address):
    page.goto(f"{address}/similarity?runs=mhc")
    page.wait_for_selector(CHART, timeout=60_000)
    page.wait_for_timeout(1000)
    click_cell(page, 5, 3)
    page.get_by_text("Depth 3 against depth 5").wait_for(timeout=20_000)
    page.wait_for_timeout(800)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_text("Depth 3 against depth 6").wait_for(timeout=20_000)


def test_keys_walk_the_rows_without_leaving_and_enter_opens(page, address):
    page.goto(address)
    judged(page)
    page.locator(f"{BOARD} tbody tr").first.focus()
    first = page.evaluate("() => document.activeElement.dataset.run")
    page.keyboard.press("ArrowDown")
    second = page.evaluate("() => document.activeElement.dataset.run")
    assert {first, second} == {"plain", "mhc"}
    wait_for(lambda: f"at={second}" in href(page), 20)
    page.get_by_role("heading", name=second, exact=True).first.wait_for(timeout=20_000)
    assert page.evaluate("() => document.activeElement.dataset.run") == second
    # Space unmarks: both were chosen, and are marked.
    assert page.get_by_text("2 marked:").count() == 1
    page.keyboard.press(" ")
    assert page.get_by_text("1 marked:").count() == 1
    assert "microscope" not in href(page)
    page.keyboard.press("Enter")
    wait_for(lambda: "/microscope" in href(page), 20)


def test_a_depth_under_the_cursor_asks_the_server_nothing(page, address):
    sent = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    open_microscope(page, address, "&pin=2")
    area = page.locator(f"{MICROSCOPE} .nsewdrag").first.bounding_box()
    before = len(sent)
    seen = set()
    for share in np.linspace(0.05, 0.95, 12):
        page.mouse.move(area["x"] + share * area["width"], area["y"] + area["height"] / 2)
        page.wait_for_timeout(60)
        seen.add(page.locator(".depthscope-pane h2").text_content())
    assert len(seen) > 4
    assert len(sent) == before
    page.mouse.move(10, 10)
    microscope_heading(page, "Depth 2:")


def test_a_token_that_is_clicked_is_marked_everywhere_and_in_the_address(page, address):
    open_microscope(page, address)
    button = page.locator(".depthscope-pane button").first
    label = button.get_attribute("aria-label")
    button.click()
    wait_for(lambda: "token=" in href(page), 20)
    page.wait_for_selector(".depthscope-pane tr.marked", timeout=20_000)
    position = re.search(r"token (\d+) of sequence (\d+)", label)
    assert f"token={position[2]}.{position[1]}" in href(page)
    shapes = f"document.querySelector('{MICROSCOPE} .plot').layout.shapes"
    lines = f"() => {shapes}.filter((s) => s.type === 'line').map((s) => s.y0)"
    wait_for(lambda: page.evaluate(lines) == [int(position[1])], 20)


def test_up_and_down_mark_the_tokens_of_the_map(page, address):
    open_microscope(page, address, "&token=0.1")
    page.locator(MICROSCOPE).focus()
    for key, row in (("ArrowDown", 2), ("ArrowUp", 1), ("ArrowUp", 0), ("ArrowUp", 0)):
        page.keyboard.press(key)
        wait_for(lambda row=row: f"token=0.{row}" in href(page), 20)
    marked = f"() => document.querySelector('{MICROSCOPE} .plot').layout.shapes.filter((s) => s.type === 'line')[0]?.y0"
    wait_for(lambda: page.evaluate(marked) == 0, 20)


def test_the_browser_writes_numbers_as_python_does(page):
    source = (ROOT / "app" / "dashboard" / "components" / "numbers.js").read_text(encoding="utf-8")
    draw = np.random.default_rng(0)
    values = [0.0, 1.0, -1.0, 9.996, 0.9996, 99999.4, 1e5, 1e-3, 9.999e-4, 4.42e-7, 1e6, 25409.0, 3e-12]
    values += list(draw.normal(size=300) * 10.0 ** draw.integers(-9, 9, 300))
    written = page.evaluate(f"(values) => {{ {source}; return values.map(digits); }}", values)
    assert written == [number(value) for value in values]
    special = page.evaluate(f"() => {{ {source}; return [null, NaN, Infinity, -Infinity].map(digits); }}")
    assert special == [number(value) for value in (np.nan, np.nan, np.inf, -np.inf)]


def test_the_text_is_coloured_and_its_tokens_are_walked_by_keys(page, address):
    page.goto(f"{address}/tokens?runs=plain")
    page.wait_for_selector(".depthscope-text .text button", timeout=60_000)
    tokens = page.locator(".depthscope-text .text button")
    colours = {tokens.nth(i).evaluate("e => e.style.background") for i in range(4)}
    assert len(colours) > 1
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".depthscope-text .said").text_content().startswith("Token 1")
    assert page.locator(".depthscope-text polyline").count() == 1
