"""Only a run is ever replaced by a run; what else is at the path is refused by name and stays as it was."""

from __future__ import annotations

import os

import pytest
import xarray as xr

from depthscope.diagnostics import schema


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


@pytest.mark.parametrize(
    ("name", "words"), [("folder.zarr", "contains notes.txt"), ("run.zarr.zip", "is a folder")]
)
def test_a_folder_with_a_file_of_the_user_is_refused_even_with_force(make_run, tmp_path, name, words):
    path = tmp_path / name
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    for force in (False, True):
        require_refused(make_run("residual"), path, words, force=force)


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "trace/residual/c/notes", "trace/residual/c/99/0"],
)
def test_a_run_with_a_file_of_the_user_inside_is_refused(make_run, tmp_path, name):
    run = make_run("residual", layers=1)
    path = schema.save_run(run, tmp_path / "run.zarr")
    (path / name).parent.mkdir(exist_ok=True, parents=True)
    (path / name).write_text("mine")
    require_refused(run, path, "not a part of a run|exists; replace it")
    if name not in ("trace/residual/c/99/0",):  # has a name that a run's files have
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


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_an_earlier_run_is_replaced_with_force_alone(make_run, tmp_path, suffix):
    run = make_run("residual", layers=1)
    path = schema.save_run(make_run("hc", layers=1), tmp_path / f"run{suffix}")
    require_refused(run, path, "exists; replace it with force=True")
    with schema.open_run(schema.save_run(run, path, force=True)) as back:
        xr.testing.assert_identical(back.load(), run)


def test_a_folder_that_is_no_run_stays_even_with_force(make_run, tmp_path):
    foreign, torn = tmp_path / "a" / "foreign.zarr", tmp_path / "b" / "torn.zarr"
    xr.Dataset(attrs={"mine": 1}).to_zarr(foreign, zarr_format=3, consolidated=False)
    schema.save_run(make_run("residual", layers=1), torn)
    (torn / "zarr.json").write_text("{")
    for path in (foreign, torn):
        for force in (False, True):
            require_refused(make_run("residual", layers=1), path, "is not a run", force=force)


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
    schema.save_run(make_run("hc", layers=1), link, force=True)
    assert link.is_symlink()
    with schema.open_run(real) as run:
        assert run.attrs["family"] == "hc"
    assert os.listdir(tmp_path / "disk") == [real.name]
