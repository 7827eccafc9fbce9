"""Parts in one folder are opened as the run that they are parts of; what is no part of it is refused or named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import depthscope as ds
from tests.models.small_models import llama

SIZE = 3  # sequences per forward
CUTS = ((0, 1), (1, 3), (3, 5))  # forwards of each part


@pytest.fixture(scope="module")
def whole_and_parts():
    model, generator = llama(), torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (SIZE, 9), generator=generator) for _ in range(5)]
    batches = [{"input_ids": each, "labels": each} for each in ids]
    options = {"gradients": True, "max_sequences": 16}
    whole = ds.capture(model, batches, **options)
    return whole, [ds.capture(model, batches[a:b], first_sequence=SIZE * a, **options) for a, b in CUTS]


def saved(parts, folder):
    folder.mkdir()
    for number, part in enumerate(parts):
        ds.save_run(part, folder / f"part-{number:05d}.zarr")
    return folder


def test_captures_of_parts_of_a_corpus_are_the_capture_of_all_of_it(whole_and_parts, tmp_path):
    whole, parts = whole_and_parts
    joined = ds.open_run(saved(parts, tmp_path / "corpus"))
    for name, expected in whole["statistics"].data_vars.items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(
                joined["statistics"][name], expected, rtol=1e-6, atol=1e-6, err_msg=name
            )
    for name in ("residual", "gradient", "mask", "query_entropy"):
        expected = whole["trace"][name]
        np.testing.assert_array_equal(joined["trace"][name].transpose(*expected.dims), expected, err_msg=name)
    assert joined["trace"]["sample"].values.tolist() == list(range(5 * SIZE))
    assert joined.attrs["sampling"]["sequences_seen"] == 5 * SIZE
    assert joined.attrs["parts"]["number"] == 3
    found, expected = (ds.analyze(run, metrics="effective_rank").effective_rank for run in (joined, whole))
    np.testing.assert_allclose(found, expected)


def test_a_folder_of_parts_is_one_run(whole_and_parts, tmp_path):
    folder = saved(whole_and_parts[1], tmp_path / "runs")
    ds.save_run(whole_and_parts[0], tmp_path / "whole.zarr")
    assert list(ds.diagnostics.schema.list_runs(tmp_path)) == ["runs", "whole"]
    assert list(ds.diagnostics.schema.list_runs(folder)) == ["runs"]
    trace = ds.diagnostics.schema.open_group(folder, "trace")
    assert trace.sizes["sample"] == 5 * SIZE


def test_a_part_that_cannot_be_opened_is_named_and_the_others_are_shown(whole_and_parts, tmp_path):
    folder = saved(whole_and_parts[1], tmp_path / "runs")
    (folder / "part-00001.zarr" / "zarr.json").write_text("torn")
    joined = ds.open_run(folder)
    assert list(joined.attrs["parts"]["unreadable"]) == ["part-00001.zarr"]
    assert "part-00001.zarr cannot be opened" in joined.attrs["parts"]["sentence"]
    assert joined["statistics"]["token_count"].values.tolist() == [3 * SIZE * 9]
    for number in (0, 2):
        (folder / f"part-{number:05d}.zarr" / "zarr.json").write_text("torn")
    with pytest.raises(ds.diagnostics.schema.SchemaError, match="no part of it can be opened"):
        ds.open_run(folder)


def test_what_is_no_part_of_one_run_is_refused(whole_and_parts, tmp_path):
    _, parts = whole_and_parts
    with pytest.raises(
        ds.diagnostics.schema.SchemaError, match=r"both have the sequence 3;.*first_sequence="
    ):
        ds.open_run(saved([*parts, parts[1]], tmp_path / "twice"))
    other = parts[1].copy()
    other.attrs = {**parts[1].attrs, "weights_digest": "of another model"}
    with pytest.raises(ds.diagnostics.schema.SchemaError, match=r"weights_digest is .* in part-00000"):
        ds.open_run(saved([parts[0], other], tmp_path / "other"))
