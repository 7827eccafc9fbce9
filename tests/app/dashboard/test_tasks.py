"""Does a click or two lead to each thing that people come for?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import depthscope as ds
from depthscope.app.demo.small_lm import Size, build
from depthscope.diagnostics import save_run
from tests.app.dashboard.serving import Watch, serving

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
def walked(chromium, runs_root) -> Iterator[str]:
    with serving(runs_root) as found:
        yield found


BOARD = ".depthscope-board"
ALL_JUDGED = f"() => document.querySelectorAll('{BOARD} input:not(:disabled)').length === 3"
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


def test_a_click_or_two_answer_what_people_come_for(page, walked):
    watch = Watch(page, walked)
    for task, (clicks, answer) in TASKS.items():
        page.goto(f"{walked}/?runs=plain&runs=mhc" if "figure" in task or "tested" in task else f"{walked}/")
        page.wait_for_function(ALL_JUDGED, timeout=120_000)
        for place in clicks:
            page.locator(place).first.click(timeout=60_000)
        page.locator(answer).first.wait_for(timeout=60_000)
        assert page.get_by_test_id("stException").count() == 0, task
    assert watch.errors == []
    assert watch.outside == []
