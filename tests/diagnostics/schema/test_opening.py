"""What is opened is what was saved: damage is named, and nothing but arrays is read, whatever a file says of itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import CATALOGUE, analyze, schema
from depthscope.diagnostics.schema import file_digest, limits, saving, trial, zarr_stores
from depthscope.diagnostics.schema.attributes import encode_dataset

SMALL = {"layers": 2, "samples": 2, "tokens": 4, "features": 8}


@pytest.fixture(scope="module")
def analysed(make_run):
    run = make_run("mhc", **SMALL)
    run["metrics"] = analyze(run, metrics=list(CATALOGUE)[:3])
    return run


@pytest.fixture
def run(analysed):
    return analysed.copy(deep=True)


ALL_AS_IT_IS = {"compressors": None, "write_empty_chunks": True}


def _saved_without_checksums(run: xr.DataTree, path: Path) -> Path:
    """As the versions before checksums saved it; compressed arrays are refused (`test_compressed_arrays_are_refused`)."""
    encoded = run.map_over_datasets(encode_dataset)
    if path.suffix == ".nc":
        encoded.to_netcdf(path, engine="h5netcdf")
    else:
        plain = {node.path: dict.fromkeys(node.variables, ALL_AS_IT_IS) for node in encoded.subtree}
        encoded.to_zarr(path, consolidated=False, encoding=plain)
    return path


# --- verified, not verified, damaged


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_run_is_verified_when_it_is_opened(run, tmp_path, suffix):
    path = schema.save_run(run, tmp_path / f"run{suffix}")
    with schema.open_run(path) as back:
        assert schema.integrity(back) == "verified"
        xr.testing.assert_identical(back.load(), run)
        # Saving what was opened and opening it again changes nothing.
        again = schema.save_run(back, tmp_path / f"again{suffix}")
    with schema.open_run(again) as back:
        assert schema.integrity(back) == "verified"
        assert back.attrs == run.attrs
    with schema.open_run(path, verify=False) as back:
        assert schema.integrity(back).startswith("not verified: its checksums were not compared")
    assert schema.integrity(run).startswith("not verified: it was not opened")


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_run_of_an_earlier_version_is_opened_with_a_note(run, tmp_path, suffix, caplog):
    path = _saved_without_checksums(run, tmp_path / f"old{suffix}")
    with schema.open_run(path) as back:
        assert schema.integrity(back).startswith("not verified: it was saved without checksums")
        xr.testing.assert_identical(back.load(), run)
    assert [record.message for record in caplog.records] == [f"{path}: {schema.integrity(back)}"]


def test_the_damaged_variable_is_named(run, tmp_path):
    path = schema.save_run(run, tmp_path / "run.nc")
    values = run.trace.residual.values.astype("<f4").tobytes()
    data = path.read_bytes()
    place = data.index(values[:64])
    path.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    with pytest.raises(schema.SchemaError, match="/trace/residual"):
        schema.open_run(path)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda file: file["trace/residual"].write_direct(np.zeros((5, 2, 4, 4, 8), "f4")),
            "changed: /trace/residual",
        ),
        (lambda file: file.attrs.modify("family", "residual"), "changed: /"),
        (lambda file: file["trace/residual"].attrs.create("scale_factor", 2.0), "changed: /trace/residual"),
        (lambda file: file["trace"].pop("h_post"), "missing: /trace/h_post"),
    ],
    ids=["values", "attribute", "scale", "removed"],
)
def test_what_another_program_changed_is_named(run, tmp_path, edit, named):
    path = schema.save_run(run, tmp_path / "run.nc")
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(schema.SchemaError, match=named):
        schema.open_run(path)
    with schema.open_run(path, verify=False) as back:
        assert schema.integrity(back).startswith("not verified")


def test_a_repacked_file_is_still_verified(run, tmp_path):
    path = schema.save_run(run, tmp_path / "run.nc")
    content = path.read_bytes()
    # Another program that writes the file anew leaves our digest of its bytes out.
    path.write_bytes(content[: content.rindex(b"\ndepthscope file sha256:")])
    assert file_digest.compare_file_digest(path) == "absent"
    with schema.open_run(path) as back:
        assert schema.integrity(back) == "verified"


def test_texts_and_attributes_that_no_format_can_have_are_stored_visibly(run, tmp_path):
    trace = run["trace"].to_dataset()
    texts = np.full((2, 4), "a", object)
    texts[0, :2] = ["nul\0", ""]
    trace["token_text"] = (("sample", "token"), texts)
    run["trace"] = trace
    run.attrs |= {"large": 2**80, "nul": "a\0b", "half": "\ud800", "nan": float("nan"), "deep": {"a": [[1]]}}
    for suffix in schema.SUFFIXES:
        with schema.open_run(schema.save_run(run, tmp_path / f"run{suffix}")) as back:
            assert back.trace.token_text.values[0, :2].tolist() == ["nul␀", ""]
            assert {**back.attrs, "nan": 0} == {**run.attrs, "nan": 0}
            assert schema.integrity(back) == "verified"


# --- what gets in


def test_an_old_zarr_format_is_refused_before_its_codec_runs(run, tmp_path):
    # numcodecs decodes a chunk of the codec `pickle` by unpickling it, which runs any program.
    path = schema.save_run(run, tmp_path / "run.zarr")
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
        ({"codecs": "bytes"}, "codecs"),
        ({"data_type": "object"}, "type 'object'"),
        ({"data_type": {"name": "numpy.datetime64"}}, "type"),
        ({"shape": [10**6, 10**6, 1, 1, 1]}, "arrays need"),
        ({"shape": [2, -1, 4, 4, 8]}, "whole numbers"),
        ({"shape": [True, 2, 4, 4, 8]}, "whole numbers"),
        ({"storage_transformers": [{"name": "x"}]}, "storage transformers"),
        ({"chunk_grid": {"name": "rectangular"}}, "chunk grid"),
        ({"dimension_names": [1, 2, 3, 4, 5]}, "dimension names"),
        ({"surprise": 1}, "surprise"),
        ({"zarr_format": 2}, "zarr_format 2"),
        ({"attributes": []}, "no JSON object"),
    ],
)
def test_metadata_of_zarr_that_a_run_does_not_have(run, tmp_path, change, reason):
    path = schema.save_run(run, tmp_path / "run.zarr")
    file = path / "trace" / "residual" / zarr_stores.METADATA
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(schema.SchemaError, match=reason):
        schema.open_run(path)


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, '{"a":' * 70 + "1" + "}" * 70, '{"a": 1, "a": 2}', "7", "\udcff"]
)
def test_odd_json_in_a_store(run, tmp_path, text):
    path = schema.save_run(run, tmp_path / "run.zarr")
    (path / "trace" / zarr_stores.METADATA).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(schema.SchemaError, match=r"trace/zarr\.json"):
        schema.open_run(path)


def test_a_store_contains_its_own_files_only(run, tmp_path):
    path = schema.save_run(run, tmp_path / "run.zarr")
    chunk = next((path / "trace" / "mask" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    content = chunk.read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    chunk.unlink()
    with pytest.raises(schema.SchemaError, match="some are missing"):
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


def _external_link(file: h5py.File) -> None:
    file["trace/outside"] = h5py.ExternalLink("/etc/hostname", "/")


def _soft_link(file: h5py.File) -> None:
    file["trace/other"] = h5py.SoftLink("/trace/residual")


def _cycle(file: h5py.File) -> None:
    file["trace/again"] = file["trace"]


def _second_link(file: h5py.File) -> None:
    file["trace/copy"] = file["trace/residual"]


def _external_storage(file: h5py.File) -> None:
    file.create_dataset("trace/host", (4,), "u1", external=[("/etc/hostname", 0, 4)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((1,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (1,))
    file.create_virtual_dataset("trace/virtual", layout)


def _compressed(file: h5py.File) -> None:
    file.create_dataset("trace/bomb", (1 << 24,), "u1", compression="gzip", chunks=(1 << 24,))[:] = 0


def _never_written(file: h5py.File) -> None:
    file.create_dataset("trace/empty", (10**12,), "f4", chunks=(1 << 16,))


def _deep(file: h5py.File) -> None:
    file.create_group("/".join(["trace", *"abcdefghij"]))


def _references(file: h5py.File) -> None:
    file.create_dataset("trace/reference", data=np.array([file["trace"].ref], h5py.ref_dtype))


def _odd_attribute(file: h5py.File) -> None:
    file["trace"].attrs["odd"] = np.void(b"x" * 8)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (_external_link, "outside is an external link"),
        (_soft_link, "other is a soft link"),
        (_cycle, "second link"),
        (_second_link, "second link"),
        (_external_storage, "stored in other files"),
        (_virtual, "stored in other files"),
        (_compressed, "filter deflate"),
        (_never_written, "bytes by its shape"),
        (_deep, "groups deep"),
        (_references, "has the type"),
        (_odd_attribute, "attribute 'odd'"),
    ],
)
def test_what_hdf5_can_do_and_a_run_does_not(run, tmp_path, add, reason):
    path = schema.save_run(run, tmp_path / "run.nc")
    with h5py.File(path, "r+") as file:
        add(file)
    # By its author, with a valid digest of its bytes: the structure is refused whatever the digest says.
    content = path.read_bytes()
    file_digest.write_with_digest(path, content.partition(b"\ndepthscope file sha256:")[0])
    with pytest.raises(schema.SchemaError, match=reason):
        schema.open_run(path)


def test_a_file_on_which_the_library_does_not_end_is_refused(run, tmp_path, monkeypatch):
    path = _saved_without_checksums(run, tmp_path / "run.nc")
    (tmp_path / "loops.py").write_text("while True: pass")
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trial, "_PATIENCE", -4 * 4.0)
    monkeypatch.setattr(trial, "_CHILD", "loops")
    with pytest.raises(schema.SchemaError, match="does not end"):
        schema.open_run(path)
    monkeypatch.setattr(trial, "_PATIENCE", 15.0)
    monkeypatch.setattr(trial, "_CHILD", "crashes")
    with pytest.raises(schema.SchemaError, match=r"HDF5 library fails on it \(exit status -6\)"):
        schema.open_run(path)


def test_no_pipe_and_no_device_is_opened(tmp_path):
    for suffix in schema.SUFFIXES:
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name, kind in (("pipe", "a named pipe"), ("zero", "a device")):
            with pytest.raises(schema.SchemaError, match=f"it is {kind}"):
                schema.open_run(tmp_path / f"{name}{suffix}")
    (tmp_path / "folder.nc").mkdir()
    with pytest.raises(schema.SchemaError, match="it is a folder; expected a file"):
        schema.open_run(tmp_path / "folder.nc")


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_run_above_the_limit_is_refused(run, tmp_path, suffix):
    path = schema.save_run(run, tmp_path / f"run{suffix}")
    with pytest.raises(schema.SchemaError, match="more than the limit of 1000 bytes"):
        schema.open_run(path, max_bytes=1000)
    with schema.open_run(path, max_bytes=10**9):
        pass


def test_the_default_limit_follows_the_bytes_on_disk():
    assert limits.Limit.of(10**9, None).max_bytes == (256 << 20) + 8 * 10**9


def test_every_array_has_a_checksum(run, tmp_path):
    saving._write(run.map_over_datasets(encode_dataset), tmp_path / "run.nc", ".nc")
    with h5py.File(tmp_path / "run.nc") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if _lacks_checksum(item) else None)
    assert names == []


def _lacks_checksum(item: h5py.Group | h5py.Dataset) -> bool:
    is_array = isinstance(item, h5py.Dataset) and item.ndim > 0 and item.size > 0
    # A dimension without labels has no values that could be damaged.
    return is_array and not item.fletcher32 and item.id.get_storage_size() > 0
