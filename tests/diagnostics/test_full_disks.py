"""A disk that is full costs a file and nothing else: no crash, no half of a file, and a training that goes on to its end."""

from __future__ import annotations

import sys

import pytest

from tests.diagnostics.full_disks import in_another_process

# A limit on a file's size comes out of the same call as a full disk; whatever else is written goes through these writers.
CASES = [("zip", "file"), ("zarr", "disk"), ("analyze", "disk"), ("record", "disk")]
FULL = ("no space left on device", "file too large", "no space left")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")
@pytest.mark.parametrize(("kind", "limit"), CASES)
def test_where_there_is_no_room_nothing_else_is_lost(kind, limit):
    try:
        attempts = in_another_process(kind, limit, 4)
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
