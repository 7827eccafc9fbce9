"""An analysis that was kept is the analysis, of these very files alone, and never a reason not to show a run."""

import shutil

import numpy as np
import pytest

from depthscope.app.readings import kept_readings as keeping
from depthscope.app.readings.kept_readings import keep, kept_readings, kept_summaries, summary_of
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import list_runs, open_run, save_run


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(scope="module", params=["a.zarr.zip", "a.zarr"])
def read_once(request, tmp_path_factory, mhc_run):
    path = save_run(mhc_run, tmp_path_factory.mktemp("runs") / request.param)
    with open_run(path) as run:
        return path, read_runs({"a": run})


@pytest.fixture
def saved(read_once, tmp_path, cache_home):
    """A run of its own for each test, and the readings of it."""
    source, readings = read_once
    path = tmp_path / "runs" / source.name
    path.parent.mkdir()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    return path, readings


def test_what_comes_back_is_what_was_kept(saved):
    path, readings = saved
    keep(path, FileVersion.of(path), readings)
    (kept,) = kept_readings(path, FileVersion.of(path))
    (made,) = readings
    assert set(kept.analysis.variables) == set(made.analysis.variables)
    for name, variable in made.analysis.variables.items():
        assert kept.analysis[name].dims == variable.dims
        assert kept.analysis[name].attrs == variable.attrs
        if variable.dtype.kind in "fiubc":
            np.testing.assert_array_equal(kept.analysis[name].values, variable.values)
        else:
            assert list(map(str, kept.analysis[name].values.flat)) == list(map(str, variable.values.flat))
    assert (kept.findings, kept.passed, kept.attrs) == (made.findings, made.passed, made.attrs)
    (summary,) = kept_summaries(path, FileVersion.of(path))
    made = summary_of(made)
    for name in ("name", "depths", "loss", "marks", "others"):
        assert getattr(summary, name) == getattr(made, name)
    for name, values in made.profiles.items():
        np.testing.assert_allclose(summary.profiles[name], values, rtol=1e-5)
    assert list_runs(path.parent) == {"a": path}


def test_another_version_of_the_run_is_not_served_and_its_former_analysis_leaves(saved, make_run):
    path, readings = saved
    keep(path, FileVersion.of(path), readings)
    save_run(make_run("mhc", seed=1), path, force=True)
    assert kept_readings(path, FileVersion.of(path)) is None
    assert kept_summaries(path, FileVersion.of(path)) is None
    keep(path, FileVersion.of(path), readings)
    assert len(list(keeping.readings_folder().iterdir())) == 2
    assert list(path.parent.iterdir()) == [path]


def test_of_a_copied_folder_or_by_another_version_of_the_code_it_is_analysed_anew(
    saved, tmp_path, monkeypatch
):
    path, readings = saved
    keep(path, FileVersion.of(path), readings)
    copy = tmp_path / "copied"
    shutil.copytree(path.parent, copy)
    assert kept_readings(copy / path.name, FileVersion.of(copy / path.name)) is None
    monkeypatch.setattr(keeping, "_code_version", lambda: "another")
    assert kept_readings(path, FileVersion.of(path)) is None


@pytest.mark.parametrize("damage", [b"", b"PK", b"{}", b"[1]"])
def test_what_is_damaged_is_made_anew(saved, damage):
    path, readings = saved
    keep(path, FileVersion.of(path), readings)
    for kept in keeping.readings_folder().iterdir():
        kept.write_bytes(damage)
    assert kept_readings(path, FileVersion.of(path)) is None
    assert not kept_summaries(path, FileVersion.of(path))


def test_compressed_arrays_are_refused(saved, tmp_path):
    path, readings = saved
    keep(path, FileVersion.of(path), readings)
    (kept,) = keeping.readings_folder().glob("*.npz")
    arrays = dict(np.load(kept))
    np.savez_compressed(kept, **arrays)
    assert kept_readings(path, FileVersion.of(path)) is None


def test_without_a_cache_that_is_the_users_alone_nothing_is_kept(saved, cache_home):
    path, readings = saved
    (cache_home / "depthscope").mkdir(parents=True)
    (cache_home / "depthscope" / "readings").mkdir(mode=0o777)
    (cache_home / "depthscope" / "readings").chmod(0o777)
    keep(path, FileVersion.of(path), readings)
    assert not list(cache_home.rglob("*.npz"))
    assert kept_readings(path, FileVersion.of(path)) is None
