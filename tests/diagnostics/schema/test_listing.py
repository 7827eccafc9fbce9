"""Runs of a folder are found by name; nothing outside the folder is offered."""

from __future__ import annotations

from depthscope.diagnostics import schema


def test_runs_below_a_folder_are_listed_and_links_outside_left_out(make_run, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    schema.save_run(make_run("residual"), root / "b.zarr.zip")
    schema.save_run(make_run("residual"), root / "sub" / "a.zarr")
    schema.save_run(make_run("residual"), outside / "c.zarr.zip")
    (root / "link.zarr.zip").symlink_to(outside / "c.zarr.zip")
    assert list(schema.list_runs(root)) == ["b", "sub/a"]
    assert list(schema.list_runs(root / "b.zarr.zip")) == ["b"]
