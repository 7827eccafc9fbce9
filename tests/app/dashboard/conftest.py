"""Runs of every kind and the pages that show them, and a headless Chromium for the tests that need a real browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope.app.dashboard.state import run_library
from depthscope.diagnostics import analyze, create_run, save_run
from depthscope.diagnostics.schema import COMPLETE
from tests.app.dashboard.opening import open_page
from tests.app.dashboard.serving import serving
from tests.app.hostile_text import TEXTS, file_names

RLO = "\u202e"

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )
    if found is None:
        message = "no chromium on the path; install one, such as: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


@pytest.fixture
def page(browser):
    """A page that knows nothing of the ones before it."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    try:
        yield context.new_page()
    finally:
        context.close()


@pytest.fixture(scope="session", autouse=True)
def _no_search_for_components():
    """Before each run of a page AppTest reads the metadata of every installed package, for components that none has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamlit.components.v2.manifest_scanner.scan_component_manifests", lambda: [])
        yield


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory, residual_run, mhc_run, make_run) -> Path:
    """A folder with one run of each kind that pages meet."""
    root = tmp_path_factory.mktemp("saved")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    save_run(make_run("residual", layers=3, gradients=False), root / "blind.zarr")
    trace = residual_run["trace"].to_dataset().load()
    broken = trace["residual"].copy(deep=True)
    broken[3] = np.nan
    save_run(create_run(trace.assign(residual=broken), attrs=residual_run.attrs), root / "nan.zarr.zip")
    shape = trace["mask"].shape
    texts = np.array([[f"t{s}.{t}" for t in range(shape[1])] for s in range(shape[0])], dtype=object)
    texts[0, 0] = f"<b>{RLO}evil</b>"
    named = trace.assign(token_text=(trace["mask"].dims, texts))
    save_run(create_run(named, attrs=residual_run.attrs), root / "<i>named.zarr.zip")
    padding = trace.assign(mask=trace["mask"] & False)
    save_run(create_run(padding, attrs=residual_run.attrs), root / "padding.zarr.zip")
    return root


@pytest.fixture
def opened(saved_runs, monkeypatch):
    """Open one page on the saved runs."""
    monkeypatch.setattr(run_library, "_roots", [])
    return lambda page, **parameters: open_page(page, [saved_runs], **parameters)


# --- a server for all that ask one

HOSTILE = {
    case: TEXTS[case]
    for case in ("url", "markdown_link", "directive", "entities", "arrows", "math", "plotly")
}
NAMES = file_names(HOSTILE)


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory, residual_run, mhc_run, make_run) -> Path:
    """Two runs, and one with an attack in its name and its attributes for each hostile text."""
    root = tmp_path_factory.mktemp("served")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    small = make_run("residual", layers=2, weights=False)
    names = ["effective_rank", "cka", "residual_norm", "gradient_norm", "num_tokens"]
    metrics = analyze(small, metrics=names).assign_attrs({COMPLETE: True})
    for case, name in NAMES.items():
        run = xr.DataTree.from_dict({"/": xr.Dataset(attrs=small.attrs), "/metrics": metrics})
        run.attrs |= dict.fromkeys(("model", "commit", "created", "software"), HOSTILE[case])
        save_run(run, root / "run.zarr.zip")
        (root / "run.zarr.zip").rename(root / f"{name}.zarr.zip")
    return root


@pytest.fixture(scope="session")
def address(runs_root) -> Iterator[str]:
    with serving(runs_root) as found:
        yield found
