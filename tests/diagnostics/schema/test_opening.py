"""What is opened is what was saved: damage is named, and nothing but arrays is read, whatever a store claims about itself."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from google_crc32c import value as crc32c

from depthscope.diagnostics import CATALOGUE, analyze, schema
from depthscope.diagnostics.schema import validation, zarr_stores

SMALL = {"layers": 2, "samples": 2, "tokens": 4, "features": 8}


@pytest.fixture(scope="module")
def analysed(make_run):
    run = make_run("mhc", **SMALL)
    run["metrics"] = analyze(run, metrics=list(CATALOGUE)[:3])
    return run


@pytest.fixture
def run(analysed):
    return analysed.copy(deep=True)


@pytest.fixture(scope="module")
def saved(analysed, tmp_path_factory):
    return schema.save_run(analysed, tmp_path_factory.mktemp("saved") / "run.zarr")


@pytest.fixture
def path(saved, tmp_path):
    """A store that is the test's own."""
    return shutil.copytree(saved, tmp_path / "run.zarr")


def chunk_of(path: Path, name: str) -> Path:
    """The first chunk of a variable."""
    return min(each for each in (path / name / "c").rglob("*") if each.is_file())


# --- the same again, or damaged


@pytest.mark.parametrize("byte", [20, -1])
def test_one_flipped_bit_is_refused_with_the_name_of_the_variable(path, byte):
    chunk = chunk_of(path, "trace/residual")
    content = bytearray(chunk.read_bytes())
    content[byte] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(
        schema.SchemaError, match=r"run\.zarr: trace/residual/c/.* (is damaged|is torn|it is torn)"
    ):
        schema.open_run(path)


def test_a_cut_zip_file_and_one_of_another_program_are_refused(run, tmp_path):
    path = schema.save_run(run, tmp_path / "run.zarr.zip")
    content = path.read_bytes()
    for part in (content[:-1], content[: len(content) // 2], b"not a zip file", b""):
        path.write_bytes(part)
        with pytest.raises(schema.SchemaError, match=r"run\.zarr\.zip: it cannot be read"):
            schema.open_run(path)


def test_a_variable_that_another_program_changed_is_read_as_it_is(path):
    zarr.open_array(path / "trace" / "residual", mode="r+")[:] = 0
    with schema.open_run(path) as back:
        assert not back.trace.residual.values.any()


def test_texts_and_attributes_that_no_format_can_have_are_stored_visibly(run, tmp_path):
    trace = run["trace"].to_dataset()
    texts = np.full((2, 4), "a", object)
    texts[0, :2] = ["nul\0", ""]
    trace["token_text"] = (("sample", "token"), texts)
    trace["residual"].attrs |= {"scale_factor": 2.0, "units": "days since 2020-01-01"}
    run["trace"] = trace
    run.attrs |= {
        "large": 2**80,
        "nul": "a\0b",
        "half": "\ud800",
        "nan": float("nan"),
        "deep": {"a": [[1]]},
        "own": "json:{",
    }
    for suffix in schema.SUFFIXES:
        with schema.open_run(schema.save_run(run, tmp_path / f"run{suffix}")) as back:
            assert back.trace.token_text.values[0, :2].tolist() == ["nul␀", ""]
            assert {**back.attrs, "nan": 0} == {**run.attrs, "nan": 0}
            xr.testing.assert_equal(back.trace.residual, run.trace.residual)
            assert back.trace.residual.attrs == run.trace.residual.attrs


def test_every_array_has_a_checksum_and_a_chunk_a_depth(make_run, tmp_path):
    path = schema.save_run(
        make_run("residual", layers=2, samples=8, tokens=128, features=128), tmp_path / "run.zarr"
    )
    arrays = [array for _, array in zarr.open_group(path, mode="r")["trace"].arrays()]
    assert all(type(array.metadata.codecs[-1]).__name__ == "Crc32cCodec" for array in arrays)
    residual = zarr.open_array(path / "trace" / "residual", mode="r")
    assert residual.chunks == (1, *residual.shape[1:])


# --- what gets in


def test_an_old_zarr_format_is_refused_before_its_codec_runs(path, tmp_path):
    # numcodecs decodes a chunk of the codec `pickle` by unpickling it, which runs any program.
    shutil.rmtree(path / "trace" / "mask")
    (path / "trace" / "mask").mkdir()
    metadata = {
        "zarr_format": 2,
        "shape": [2, 4],
        "chunks": [2, 4],
        "dtype": "|O",
        "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
        "fill_value": None,
        "order": "C",
    }
    (path / "trace" / "mask" / ".zarray").write_text(json.dumps(metadata))
    canary = tmp_path / "code-ran"
    (path / "trace" / "mask" / "0.0").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(schema.SchemaError, match="belongs to no variable"):
        schema.open_run(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]}, "codecs"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, "codecs"),
        ({"data_type": "object"}, "type 'object'"),
        ({"shape": [10**6, 10**6, 1, 1, 1]}, "arrays need"),
        ({"shape": [2, -1, 4, 4, 8]}, "whole numbers"),
        ({"storage_transformers": [{"name": "x"}]}, "transformers"),
        ({"chunk_grid": {"name": "rectangular"}}, "regular chunks"),
        ({"dimension_names": [1]}, "named dims"),
        ({"zarr_format": 2}, "zarr_format 3"),
    ],
)
def test_metadata_of_zarr_that_a_run_does_not_have(path, change, reason):
    file = path / "trace" / "residual" / zarr_stores.METADATA
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(schema.SchemaError, match=reason):
        schema.open_run(path)


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"a": 1}', "7", "\udcff"])
def test_odd_json_in_a_store(path, text):
    (path / "trace" / zarr_stores.METADATA).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(schema.SchemaError, match=r"trace/zarr\.json"):
        schema.open_run(path)


def test_a_store_contains_its_own_files_only(path, tmp_path):
    chunk = next((path / "trace" / "mask" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    content = chunk.read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    chunk.unlink()
    with pytest.raises(schema.SchemaError, match=r"some are missing|of it is missing"):
        schema.open_run(path)
    chunk.symlink_to(outside)
    with pytest.raises(schema.SchemaError, match="link, a pipe or a device"):
        schema.open_run(path)
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(schema.SchemaError, match="link, a pipe or a device"):
        schema.open_run(path)
    chunk.unlink()
    chunk.write_bytes(content)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(schema.SchemaError, match=r"notes\.txt in it belongs to no variable"):
        schema.open_run(path)


def recoded(chunk: Path, data: bytes) -> None:
    """A chunk as somebody forges it: its checksum is right."""
    chunk.write_bytes(data + crc32c(data).to_bytes(4, "little"))


def test_a_chunk_that_decodes_to_more_than_its_array_has_is_refused(path, run):
    chunk = chunk_of(path, "trace/residual")
    size = run.trace.residual.nbytes
    compress = numcodecs.Zstd(level=1).encode
    for data in (
        bytes(compress(bytes(1 << 24))),  # a bomb
        bytes(compress(bytes(size)))[:-1],
        b"",
        bytes([0x28, 0xB5, 0x2F, 0xFD, 0, 0x58]) + bytes(40),  # does not say its size
        b"not a frame" * 10,
    ):
        recoded(chunk, data)
        with pytest.raises(schema.SchemaError, match="bytes of data"):
            schema.open_run(path)
    # Two frames, of which the first has the size that is expected.
    recoded(chunk, bytes(compress(bytes(size))) + bytes(compress(bytes(1 << 30))))
    with pytest.raises(schema.SchemaError, match="bytes of data"):
        schema.open_run(path)


def test_the_number_of_texts_is_looked_at_before_they_are_decoded(path):
    recoded(chunk_of(path, "trace/module"), (2**32 - 1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(schema.SchemaError, match="4294967295 texts"):
        schema.open_run(path)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("../outside", {}, "no name of a file"),
        ("trace/zarr.json", {}, "there twice"),
        ("notes.txt", {}, "belongs to no variable"),
        ("trace/residual/c/0", {"compress_type": zipfile.ZIP_DEFLATED}, "compressed or encrypted"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_a_zip_file_that_a_run_does_not_have(run, tmp_path, name, options, reason):
    path = schema.save_run(run, tmp_path / "run.zarr.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, bytes(1 << 20), **options)
    with pytest.raises(schema.SchemaError, match=reason):
        schema.open_run(path)


def test_a_thousand_groups_are_refused_and_not_opened_one_by_one(path):
    for number in range(1000):
        group = path / "trace" / str(number)
        group.mkdir()
        (group / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(schema.SchemaError, match="256 groups"):
        schema.open_run(path)


def test_no_pipe_and_no_device_is_opened(tmp_path):
    for suffix in schema.SUFFIXES:
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name, kind in (("pipe", "a named pipe"), ("zero", "a device")):
            with pytest.raises(schema.SchemaError, match=f"it is {kind}"):
                schema.open_run(tmp_path / f"{name}{suffix}")
    (tmp_path / "folder.zarr.zip").mkdir()
    with pytest.raises(schema.SchemaError, match="it is a folder; expected a file"):
        schema.open_run(tmp_path / "folder.zarr.zip")


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_run_above_the_limit_is_refused(run, tmp_path, suffix):
    path = schema.save_run(run, tmp_path / f"run{suffix}")
    with pytest.raises(schema.SchemaError, match="more than the limit of 1000 bytes"):
        schema.open_run(path, max_bytes=1000)
    with schema.open_run(path, max_bytes=10**9):
        pass


def test_the_default_limit_follows_the_bytes_on_disk():
    validation.require_room((256 << 20) + 32 * 10**9, 10**9)
    with pytest.raises(schema.SchemaError, match="1000000000 stored bytes can account for"):
        validation.require_room((256 << 20) + 32 * 10**9 + 1, 10**9)
