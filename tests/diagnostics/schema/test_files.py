"""A saved run comes back complete; what is not a run is refused with a sentence."""

from __future__ import annotations

import os

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import attributes, saving


def write(tree, path):
    """Any tree in the format of a run."""
    path.parent.mkdir()
    (saving.write_zip if path.suffix == ".zip" else saving._write_folder)(tree, path)


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_a_run_survives_the_disk(make_run, tmp_path, family, suffix):
    run = make_run(family)
    run.attrs |= {"none": None, "flag": True, "empty": "", "nested": {"a": [1, None]}}
    path = schema.save_run(run, tmp_path / f"run{suffix}")
    with schema.open_run(path) as back:
        xr.testing.assert_identical(back.load(), run)
        assert back.attrs == run.attrs


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_an_opened_run_can_be_extended_and_saved_over_itself(make_run, tmp_path, suffix):
    path = schema.save_run(make_run("mhc"), tmp_path / f"run{suffix}")
    run = schema.open_run(path)
    run["metrics"] = xr.Dataset({"answer": (("step", "stream"), np.ones((1, 2)))}, {"stream": ["mean", "0"]})
    schema.save_run(run, path, force=True)
    run.close()
    with schema.open_run(path) as back:
        assert float(back["metrics/answer"].sum()) == 2.0
        assert list(back["metrics"].stream.values) == ["mean", "0"]
        assert back.trace.residual.shape == (13, 2, 16, 4, 32)
    assert os.listdir(tmp_path) == [path.name]


def test_opening_reads_no_array(make_run, tmp_path):
    path = schema.save_run(make_run("residual"), tmp_path / "run.zarr.zip")
    with schema.open_run(path) as run:
        assert not run["trace"].to_dataset().variables["residual"]._in_memory


def test_a_failing_save_leaves_the_earlier_file(make_run, tmp_path):
    run = make_run("residual")
    path = schema.save_run(run, tmp_path / "run.zarr.zip")
    before = path.read_bytes()
    broken = run.copy()
    broken.attrs["bad"] = object()
    with pytest.raises(TypeError, match="an attribute has the type object"):
        schema.save_run(broken, path, force=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.zarr.zip"]


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_foreign_and_a_newer_file_are_refused(make_run, tmp_path, suffix):
    foreign = tmp_path / "a" / f"foreign{suffix}"
    write(xr.DataTree(xr.Dataset({"x": ("y", [1.0])})), foreign)
    with pytest.raises(schema.SchemaError, match="not a depthscope run"):
        schema.open_run(foreign)
    newer = make_run("residual")
    newer.attrs["schema_version"] = "2.0"
    write(newer.map_over_datasets(attributes.encode_dataset), tmp_path / "b" / f"newer{suffix}")
    with pytest.raises(schema.SchemaError, match=r"schema version 2.0.*read it with a newer depthscope"):
        schema.open_run(tmp_path / "b" / f"newer{suffix}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".zarr.zip", "is an ending without a name"),
        (".zarr", "is an ending without a name"),
        ("run.pkl", r"ends in \.zarr, \.zarr\.zip"),
        ("run.nc", r"name it run\.zarr, or write netCDF by run\.to_netcdf"),
    ],
)
def test_a_name_that_no_run_has_is_refused(make_run, tmp_path, name, message):
    with pytest.raises(schema.SchemaError, match=message):
        schema.save_run(make_run("residual", layers=1), tmp_path / name)
    if name not in schema.SUFFIXES:
        with pytest.raises(schema.SchemaError, match=message):
            schema.open_run(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no run at"):
        schema.open_run(tmp_path / "none.zarr.zip")


def test_two_chains_are_two_child_groups(make_run, tmp_path):
    trace = make_run("residual")["trace"].to_dataset()
    run = schema.create_run(
        {"encoder": trace, "decoder": trace.isel(depth=slice(3))}, attrs={"family": "residual"}
    )
    path = schema.save_run(run, tmp_path / "two.zarr.zip")
    with schema.open_run(path) as back:
        assert schema.chains(back) == ["encoder", "decoder"]
        assert schema.chain_dataset(back, "trace", "decoder").sizes["depth"] == 3
        assert schema.chain_dataset(back, "metrics", "decoder") is None


def test_runs_below_a_folder_are_listed_and_links_outside_left_out(make_run, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in ("b.zarr.zip", "sub/a.zarr", "sub/c.zarr", "sub/c.zarr.zip"):
        schema.save_run(make_run("residual"), root / path)
    schema.save_run(make_run("residual"), outside / "c.zarr.zip")
    (root / "link.zarr.zip").symlink_to(outside / "c.zarr.zip")
    assert list(schema.list_runs(root)) == ["b", "sub/a", "sub/c.zarr", "sub/c.zarr.zip"]
    assert list(schema.list_runs(root / "b.zarr.zip")) == ["b"]
