"""How many clicks, and seconds of the server's processor, does each thing that people come for take?"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import depthscope as ds
from depthscope.app.demo.small_lm import Size, build
from depthscope.diagnostics import save_run
from tests.app.dashboard.first_visit import seconds
from tests.app.dashboard.serving import serving_process, wait_for
from tests.app.dashboard.walking import BOARD, RANGE, drag, href, microscope_heading, open_microscope

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory, residual_run, mhc_run) -> Path:
    """Two runs, and a training with hyper-connections."""
    root = tmp_path_factory.mktemp("walked")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    model = build("hc", size=Size(layers=2, width=16, heads=2))
    ids = torch.arange(64).reshape(2, 32) % 50
    with ds.record(model, every=1, metrics="live", store=root / "training") as recorder:
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            recorder.step(loss)
    return root


@pytest.fixture(scope="module")
def walked(chromium, runs_root) -> Iterator[tuple[str, int]]:
    with serving_process(runs_root) as found:
        yield found


TASKS = {
    "the largest token of a finding": (
        [f"{BOARD} tr[data-run=mhc] .worst button"],
        ".depthscope-pane td button",
    ),
    "H_res of a run": ([f"{BOARD} tr[data-run=mhc] .worst button"], ".depthscope-pane .matrix"),
    "the blocks least needed": (["a[href$='/similarity']"], "text=Least needed"),
    "two runs at a depth, tested": ([f"{BOARD} button:text-is('Compare')"], "text=95 % interval"),
    "HC's gain over training": (["a[href$='/training']"], ".depthscope-training >> text=Composite gain"),
    "a figure into a paper": (["a[href$='/data']", "button:has-text('PDF')"], "text=includegraphics"),
    "what is wrong with a run": ([f"{BOARD} tr[data-run=mhc] .name"], "h2:has-text('mhc')"),
}
"""Task → what is clicked, and what answers it."""


def test_a_view_is_shared_by_its_address(page, walked):
    address, process = walked
    open_microscope(page, address, "&pin=4&against=2")
    drag(page, 0.2, 0.7)
    wait_for(lambda: "zoom_microscope=" in href(page), 20)
    page.wait_for_timeout(2_000)
    zoomed, link = page.evaluate(RANGE), href(page)
    before = seconds(process)
    other = page.context.browser.new_context().new_page()
    other.goto(link)
    microscope_heading(other, "Depth 4 against depth 2:")
    wait_for(lambda: other.evaluate(RANGE) == pytest.approx(zoomed, abs=1e-4), 20)
    page.wait_for_timeout(1_000)
    log_seconds("a view for somebody else", 0, seconds(process) - before)


def log_seconds(task: str, clicks: int, spent: float) -> None:
    logging.getLogger(__name__).info("%s: %d clicks, %.2f s", task, clicks, spent)
    # The goal is one second, and docs/dashboard.md has what a quiet machine takes; this finds what is off by its order.
    assert spent < 4.0
