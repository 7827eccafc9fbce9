"""A disk that is full costs a file and nothing else: no crash, no half of a file, and a training that goes on to its end.

Every size is tried on a file system in memory of that size, or under a limit on the sizes of files. Every attempt is a fork of
this process, so that a crash is an exit status.
"""

from __future__ import annotations

import errno
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from zarr.storage import _local

from depthscope import probes
from depthscope.app.cli.main import main
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import saving
from depthscope.probes.training import notices
from tests.diagnostics.small_disks import small_disk
from tests.models.synthetic_run import synthetic_run

STEPS = 3
SECONDS = 120  # after which an attempt is killed
FULL = ("no space left on device", "file too large")
PRINTED = notices.say_as_text  # which other tests are not to reach


def saved(suffix: str) -> Callable[[Path, Path], object]:
    run = synthetic_run("hc", layers=2, tokens=16, features=16)
    return lambda small, roomy: schema.save_run(run, small / f"run{suffix}")


def trained(small: Path, roomy: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, gradients=True, store=small / "run") as recorder:
        for _ in range(STEPS):
            loss = model(torch.ones(2, 6, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss)
    assert recorder.run.statistics.sizes["step"] == STEPS
    (roomy / "checkpoint").touch()


def analyzed(small: Path, roomy: Path) -> int:
    run = schema.save_run(
        synthetic_run("hc", layers=1, tokens=8, features=8), roomy / "run.zarr.zip", force=True
    )
    return main(["analyze", str(run), "--metrics", "stream_cosine", "--out", str(small / "metrics.zarr.zip")])


def attempt(
    work: Callable[[Path, Path], object], small: Path, roomy: Path, most: int | None
) -> tuple[int, str]:
    """Exit status of a fork that does the work, and what it said; ``most``: bytes that its files may have."""
    said = roomy / "said"
    child = os.fork()
    if not child:
        status = 99
        try:
            signal.alarm(SECONDS)
            sys.stdout = sys.stderr = said.open("w")
            if most is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            result = work(small, roomy)
            status = result if type(result) is int else 0
        except OSError as error:
            sys.stderr.write(f"OSError: {error}\n")
            status = 2
        except BaseException:
            sys.stderr.write(traceback.format_exc())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (roomy / "modules").write_text(" ".join(sys.modules))
            sys.stderr.close()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text(errors="replace")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")
@pytest.mark.parametrize(
    ("kind", "limit"), [("zip", "file"), ("zarr", "disk"), ("analyze", "disk"), ("record", "disk")]
)
def test_where_there_is_no_room_nothing_else_is_lost(kind, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "say_as_text", PRINTED)
    work = {"zip": saved(".zarr.zip"), "zarr": saved(".zarr"), "analyze": analyzed, "record": trained}[kind]
    small, roomy = tmp_path / "small", tmp_path / "roomy"
    small.mkdir(), roomy.mkdir()
    with small_disk(small, 1 << 28):
        assert attempt(work, small, roomy, None)[0] == 0
        for name in (roomy / "modules").read_text().split():  # which the other attempts need not import
            with suppress(Exception):
                importlib.import_module(name)
        disk = os.statvfs(small)
        files = [path for path in small.rglob("*") if path.is_file()]
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        enough, names = (used if limit == "disk" else max(file.stat().st_size for file in files)), len(files)
    failed = 0
    for share in (0.02, 0.4, 0.8, 20.0):  # while it is written there is more than in the end
        size = 4096 * (1 + int(share * enough) // 4096)
        (roomy / "checkpoint").unlink(missing_ok=True)
        with small_disk(small, size) if limit == "disk" else nullcontext():
            status, told = attempt(work, small, roomy, size if limit == "file" else None)
            left = [path for path in small.rglob("*") if path.is_file()]
            for path in left:
                if path.name.endswith(".zarr.zip"):
                    schema.open_run(path).close()  # what is there is complete
                path.unlink() if limit == "file" else None
        is_full = any(reason in told.lower() for reason in FULL)
        assert status == 0 if kind == "record" else status == 2 * is_full, told
        assert (roomy / "checkpoint").exists() == (kind == "record")
        assert not [path for path in left if ".depthscope-" in str(path)]
        assert "Traceback" not in told
        assert is_full or len(left) == names
        failed += is_full
    assert 0 < failed < 4


def test_a_write_that_comes_after_an_error_leaves_no_file(tmp_path, monkeypatch):
    def put(path, *rest, really=_local._put, **options):
        if path.name == "0":
            raise OSError(errno.ENOSPC, "full")
        time.sleep(0.2 * (path.name == "1"))
        return really(path, *rest, **options)

    monkeypatch.setattr(_local, "_put", put)
    monkeypatch.setattr(saving, "_chunk_shape", lambda variable: (1,) * variable.ndim)
    with pytest.raises(OSError, match="No space"):
        schema.save_run(synthetic_run("residual", layers=1, tokens=2, features=2), tmp_path / "run.zarr")
    time.sleep(0.5)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
