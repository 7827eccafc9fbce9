"""A disk that is full costs a file and nothing else: no crash, no half of a file, and a training that goes on to its end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import CATALOGUE, analyze, schema
from depthscope.diagnostics.schema import netcdf_image as image
from depthscope.diagnostics.schema import saving
from depthscope.diagnostics.schema.attributes import encode_dataset
from tests.diagnostics.full_disks import KINDS, LIMITS, in_another_process
from tests.thoroughness import sample_or_every

# A limit on a file's size comes out of the same call as a full disk; whatever else is written goes through these writers.
CASES = [(kind, limit) for kind in KINDS for limit in LIMITS]
FULL = ("no space left on device", "file too large", "no space left")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")
@pytest.mark.slow(more=2)
@pytest.mark.parametrize(("kind", "limit"), CASES)
def test_where_there_is_no_room_nothing_else_is_lost(kind, limit):
    number = sample_or_every(12 if kind in ("nc", "zarr") else 5, 40)
    try:
        attempts = in_another_process(kind, limit, number)
    except PermissionError as error:
        pytest.skip(str(error))
    is_training = kind.startswith("record")
    for each in attempts:
        assert each["status"] == 0 if is_training else each["status"] in (0, 2), each
        assert each["checkpoint"] == is_training, each
        assert not each["damaged"], each
        assert not [name for name in each["left"] if ".depthscope-" in name], each
        assert "Traceback" not in each["said"], each
        if each["status"] == 2:
            assert any(reason in each["said"].lower() for reason in FULL), each
    failed = [each for each in attempts if any(reason in each["said"].lower() for reason in FULL)]
    assert 0 < len(failed) < len(attempts)


def _reserved(tree: xr.DataTree, encodings) -> int:
    return image._EACH_FILE + sum(
        image._most_bytes(node.to_dataset(inherit=node is tree), encodings.get(node.path, {}))
        for node in tree.subtree
    )


@pytest.mark.parametrize("family", ["residual", "hc", "mhc"])
@pytest.mark.parametrize(
    "sizes", [{}, {"layers": 1, "tokens": 4, "features": 4}, {"layers": 12, "features": 96}]
)
def test_the_memory_of_a_file_is_reserved_before_the_library_writes(make_run, family, sizes):
    run = make_run(family, **sizes)
    nodes = {"/": xr.Dataset(attrs=run.attrs), "/trace": run["trace"].to_dataset()}
    everything = xr.DataTree.from_dict({**nodes, "/metrics": analyze(run, list(CATALOGUE))})
    words = np.array([["a" * 3000, "é" * 10]] * 50, dtype=object)
    nodes["/trace"] = nodes["/trace"].assign_attrs(note="ü" * 40_000).assign(words=(("w", "v"), words))
    for tree in (run, everything, xr.DataTree.from_dict(nodes)):
        encoded = tree.map_over_datasets(encode_dataset)
        encodings = saving._encodings(encoded, saving._netcdf_encoding)
        assert len(image.netcdf_image(encoded, encodings)) <= _reserved(encoded, encodings)


def test_a_file_for_which_there_is_no_memory_is_refused_and_the_process_lives():
    code = """
import resource, sys
import numpy as np, xarray as xr
from depthscope.diagnostics.schema.netcdf_image import netcdf_image
arrays = {f"x{i}": (("a", "b"), np.ones((1000, 1000))) for i in range(40)}
tree = xr.DataTree.from_dict({"/": xr.Dataset(), "/trace": xr.Dataset(arrays)})
netcdf_image(xr.DataTree(xr.Dataset()), {})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for spare in range(0, 480, 40):
    resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        netcdf_image(tree, {})
        print("written")
    except MemoryError as error:
        print("refused", "bytes" in str(error))
"""
    if sys.platform != "linux":
        pytest.skip("limits of Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")[:-1]
    assert len(said) == 12
    assert said[0] == "refused True"
    assert said[-1] == "written"


def test_a_run_in_memory_and_in_a_file_is_the_same(make_run, tmp_path):
    run = make_run("mhc")
    with schema.open_run(schema.save_run(run, tmp_path / "a.nc")) as back:
        assert schema.integrity(back) == "verified"
        xr.testing.assert_identical(back.load(), run)
