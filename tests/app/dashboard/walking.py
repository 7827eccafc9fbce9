"""How do tests walk through the dashboard in a browser: what they wait for, open and drag."""

BOARD = ".depthscope-board"


def judged(page, runs: int = 2) -> None:
    """All runs are judged by the processes beside the server."""
    page.wait_for_function(
        "([board, runs]) => document.querySelectorAll(`${board} input:not(:disabled)`).length === runs",
        arg=[BOARD, runs],
        timeout=120_000,
    )
    page.wait_for_timeout(1_000)


MICROSCOPE = ".depthscope-microscope"
RANGE = f"() => document.querySelector('{MICROSCOPE} .plot')?._fullLayout?.xaxis?.range.map(Number)"
PINNED = f"() => document.querySelector('{MICROSCOPE} .line.pin').dataset.depth"


def href(page) -> str:
    # Not `page.url`, which hears of nothing while a test only waits.
    return page.evaluate("() => location.href")


def open_microscope(page, address: str, more: str = "") -> None:
    page.goto(f"{address}/microscope?runs=mhc{more}")
    page.wait_for_selector(f"{MICROSCOPE} .main-svg", timeout=60_000)
    page.wait_for_timeout(1500)


def drag(page, first: float, last: float, selector: str = f"{MICROSCOPE} .nsewdrag") -> None:
    area = page.locator(selector).first.bounding_box()
    y = area["y"] + area["height"] / 2
    page.mouse.move(area["x"] + first * area["width"], y)
    page.mouse.down()
    page.mouse.move(area["x"] + last * area["width"], y, steps=8)
    page.mouse.up()


def microscope_heading(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('.depthscope-pane h2')?.textContent.startsWith(words)",
        arg=words,
        timeout=60_000,
    )
