"""Only a run is ever replaced by a run; what else is at the path is refused by name and stays as it was."""

from __future__ import annotations

import json
import os
import shutil

import h5py
import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import attributes, saving


def snapshot(path):
    if not path.is_dir():
        return path.read_bytes()
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def require_refused(run, path, match, *, force=False):
    before = snapshot(path)
    for refuse in (
        schema.require_replaceable,
        lambda target, force: schema.save_run(run, target, force=force),
    ):
        with pytest.raises(FileExistsError, match=match) as caught:
            refuse(path, force=force)
        assert "\n" not in str(caught.value)
    assert snapshot(path) == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_with_a_file_of_the_user_is_refused_even_with_force(make_run, tmp_path):
    path = tmp_path / "folder.zarr"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    for force in (False, True):
        require_refused(make_run("residual"), path, "contains notes.txt", force=force)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "trace/notes.txt",
        "trace/residual/c/notes",
        "mine/zarr.json",
        "c/0",
        "trace/residual/c/99/0",
    ],
)
def test_a_run_with_a_file_of_the_user_inside_is_refused(make_run, tmp_path, name):
    run = make_run("residual", layers=1)
    path = schema.save_run(run, tmp_path / "run.zarr")
    (path / name).parent.mkdir(exist_ok=True, parents=True)
    (path / name).write_text("mine")
    require_refused(run, path, name)
    if "notes" in name:
        require_refused(run, path, name, force=True)


def test_a_link_and_an_empty_folder_inside_a_run_are_of_others(make_run, tmp_path):
    run = make_run("residual", layers=1)
    path = schema.save_run(run, tmp_path / "run.zarr")
    (path / "trace" / "elsewhere").symlink_to("/tmp")
    require_refused(run, path, "trace/elsewhere", force=True)
    (path / "trace" / "elsewhere").unlink()
    (path / "empty").mkdir()
    require_refused(run, path, "empty", force=True)


def test_an_empty_folder_belongs_to_nobody(make_run, tmp_path):
    (tmp_path / "run.zarr").mkdir()
    with schema.open_run(schema.save_run(make_run("residual"), tmp_path / "run.zarr")) as run:
        assert "trace" in run


def foreign_files(folder):
    with h5py.File(folder / "measured.nc", "w") as file:
        file["temperature"] = np.ones(3)
    (folder / "text.nc").write_text("not at all netCDF")
    (folder / "text.zarr").write_text("no folder")
    xr.Dataset({"x": ("y", [1.0])}).to_zarr(folder / "foreign.zarr", zarr_format=3, consolidated=False)


@pytest.mark.parametrize("name", ["measured.nc", "text.nc", "text.zarr", "foreign.zarr"])
def test_what_is_no_run_is_replaced_with_force_alone(make_run, tmp_path, name):
    foreign_files(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    path = alone / name
    shutil.move(tmp_path / name, path)
    run = make_run("residual", layers=1)
    # The arrays of another program are files of others in a folder, until force says that they are not wanted.
    require_refused(run, path, "is not a run that this|is not a part of a run")
    with schema.open_run(schema.save_run(run, path, force=True)) as back:
        xr.testing.assert_identical(back.load(), run)
    assert os.listdir(alone) == [name]


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_newer_and_a_torn_run_are_replaced_with_force_alone(make_run, tmp_path, suffix):
    run = make_run("residual", layers=1)
    newer = run.copy()
    newer.attrs["schema_version"] = "2.0"
    path = tmp_path / f"run{suffix}"
    saving._write(newer.map_over_datasets(attributes.encode_dataset), path, suffix)
    require_refused(run, path, r"schema version 2\.0")
    schema.save_run(run, path, force=True)
    torn = path / "trace" / "zarr.json" if path.is_dir() else path
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    require_refused(run, path, "is not a run that this depthscope may replace")
    schema.save_run(run, path, force=True)
    with schema.open_run(path) as back:
        xr.testing.assert_identical(back.load(), run)


def test_a_folder_in_place_of_a_file_is_refused(make_run, tmp_path):
    (tmp_path / "run.nc").mkdir()
    for force in (False, True):
        require_refused(make_run("residual"), tmp_path / "run.nc", "is a folder", force=force)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_pipe_and_a_device_are_refused_at_once(make_run, tmp_path, suffix):
    pipe, device = tmp_path / f"pipe{suffix}", tmp_path / f"device{suffix}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/null")
    for path in (pipe, device):
        for force in (False, True):
            with pytest.raises(FileExistsError, match=r"is a (named pipe|device)"):
                schema.save_run(make_run("residual"), path, force=force)
    assert sorted(os.listdir(tmp_path)) == sorted([pipe.name, device.name])


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_the_run_behind_a_link_is_replaced_and_the_link_stays(make_run, tmp_path, suffix):
    (tmp_path / "disk").mkdir()
    real = schema.save_run(make_run("residual", layers=1), tmp_path / "disk" / f"run{suffix}")
    link = tmp_path / f"name{suffix}"
    link.symlink_to(real)
    schema.save_run(make_run("hc", layers=1), link)
    assert link.is_symlink()
    with schema.open_run(real) as run:
        assert run.attrs["family"] == "hc"
    assert os.listdir(tmp_path / "disk") == [real.name]


def test_nested_json_is_no_run_and_no_traceback(make_run, tmp_path):
    path = tmp_path / "run.zarr"
    path.mkdir()
    (path / "zarr.json").write_text('{"a": ' * 100_000 + json.dumps(1) + "}" * 100_000)
    require_refused(make_run("residual", layers=1), path, "is not a run that this depthscope may replace")
