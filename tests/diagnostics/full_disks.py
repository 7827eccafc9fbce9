"""What happens on a full disk, and under a limit on file sizes? ``python tests/diagnostics/full_disks.py record disk 40``.

Every size is tried on a file system in memory of that size, which only this process sees. One process imports everything and
builds what is written; every attempt is a fork of it, so that a crash is an exit status.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

PAGE = 4096
SMALL: dict[str, Any] = {"layers": 1, "tokens": 8, "features": 8}
SIZED: dict[str, Any] = {"layers": 2, "tokens": 16, "features": 16}
STEPS = 3
SECONDS = 120  # after which an attempt is killed
Work = Callable[[Path, Path], object]
"""Writes into a folder of the small disk; another folder has room."""


# --- what is written


def _save(suffix: str) -> Work:
    from depthscope.diagnostics import schema
    from tests.models.synthetic_run import synthetic_run

    run = synthetic_run("hc", **SIZED)
    return lambda small, _roomy: schema.save_run(run, small / f"run{suffix}")


def _training(name: str) -> Work:
    import torch
    from torch import nn

    from depthscope import probes

    def train(small: Path, roomy: Path) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = 0
        with probes.record(model, gradients=True, store=small / name) as recorder:
            for _ in range(STEPS):
                loss = model(torch.ones(2, 6, 8)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step(loss)
                steps += 1
        assert recorder.run.statistics.sizes["step"] == STEPS
        # The user's own file is as large as it is: here it counts whether the training comes so far.
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        torch.save({"steps": steps, "model": model.state_dict()}, roomy / "checkpoint.pt")

    return train


def _command(*words: str) -> Work:
    """A command line; RUN is a saved run on a disk with room, SMALL the small disk."""
    from depthscope.app.cli.main import main
    from depthscope.diagnostics import schema
    from tests.models.synthetic_run import synthetic_run

    run = synthetic_run("hc", **SMALL)

    def call(small: Path, roomy: Path) -> int:
        schema.save_run(run, roomy / "run.zarr.zip")
        places = {"SMALL": str(small), "RUN": str(roomy / "run.zarr.zip")}
        filled = [word for word in words]
        for name, place in places.items():
            filled = [word.replace(name, place) for word in filled]
        return main(filled)

    return call


KINDS: dict[str, Callable[[], Work]] = {
    "zip": partial(_save, ".zarr.zip"),
    "zarr": partial(_save, ".zarr"),
    "record": partial(_training, "run"),
    "analyze": partial(
        _command, "analyze", "RUN", "--metrics", "stream_cosine", "--out", "SMALL/metrics.zarr.zip"
    ),
}


# --- small disks


def enter_own_mounts() -> None:
    """See mounts of this process's own from now on; OSError where the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.unshare(os.CLONE_NEWNS) if hasattr(os, "unshare") else _checked(libc, libc.unshare(0x00020000))
    # Private, or the system's own table would change too.
    _checked(libc, libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))


def _checked(libc: ctypes.CDLL, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory with so many bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = str(folder).encode()
    _checked(libc, libc.mount(b"tmpfs", place, b"tmpfs", 0, f"size={size}".encode()))
    try:
        yield folder
    finally:
        _checked(libc, libc.umount2(place, 2))  # lazily: a killed child may not have ended yet


@contextmanager
def _limited_files(folder: Path, size: int) -> Iterator[Path]:
    """A folder for processes whose files may have so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LIMITS = {"disk": small_disk, "file": _limited_files}


# --- attempts are forks


def _attempt(work: Work, small: Path, roomy: Path, said: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 99
    signal.alarm(SECONDS)
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        result = work(small, roomy)
        status = result if isinstance(result, int) and not isinstance(result, bool) else 0
    except OSError as error:
        os.write(said, f"OSError: {error}\n".encode())
        status = 2
    except BaseException:
        os.write(said, traceback.format_exc().encode())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        (roomy / "modules.json").write_text(json.dumps(list(sys.modules)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def try_size(work: Work, limit: str, size: int) -> dict[str, Any]:
    """Write once where there is so much room: exit status, what was said, and what is left."""
    with tempfile.TemporaryDirectory(prefix="full-disks-") as place, tempfile.TemporaryFile() as said:
        small, roomy = Path(place, "small"), Path(place, "roomy")
        small.mkdir()
        roomy.mkdir()
        with LIMITS[limit](small, size):
            status = _attempt(work, small, roomy, said.fileno())
            left = {
                str(path.relative_to(small)): path.stat().st_size
                for path in sorted(small.rglob("*"))
                if path.is_file() or not any(path.iterdir())
            }
            damaged = [name for name in left if name.endswith(".zarr.zip") and not _is_intact(small / name)]
            used = os.statvfs(small)
        said.seek(0)
        return {
            "size": size,
            "status": status,
            "said": said.read().decode(errors="replace"),
            "left": left,
            "damaged": damaged,
            "used": (used.f_blocks - used.f_bfree) * used.f_frsize,
            "checkpoint": (roomy / "checkpoint.pt").exists(),
            "modules": json.loads((roomy / "modules.json").read_text()) if status >= 0 else [],
        }


def _is_intact(path: Path) -> bool:
    from depthscope.diagnostics import schema

    try:
        schema.open_run(path).close()
    except schema.SchemaError:
        return False
    return True


def try_sizes(kind: str, limit: str, number: int) -> list[dict[str, Any]]:
    """Write one kind at so many sizes, from a page to a little more than it needs."""
    work = KINDS[kind]()
    roomy = try_size(work, limit, 1 << 28)
    if roomy["status"] != 0:
        raise RuntimeError(f"{kind} fails where there is room: {roomy['said']}")
    # What one fork has imported the others need not. Imported only: a fork of a process that has trained hangs.
    for name in roomy["modules"]:
        with suppress(Exception):
            importlib.import_module(name)
    enough = roomy["used"] if limit == "disk" else max(roomy["left"].values())
    # While it is written there may be more than in the end.
    while not _is_enough(try_size(work, limit, enough), roomy):
        enough = enough * 5 // 4 + PAGE
    sizes = sorted({-(-enough * place // (number - 1) // PAGE) * PAGE for place in range(1, number + 1)})
    found = [try_size(work, limit, size) for size in sizes]
    for each in found:
        del each["modules"]
    return found


def _is_enough(found: dict[str, Any], roomy: dict[str, Any]) -> bool:
    return bool(found["status"] == 0 and found["left"].keys() == roomy["left"].keys())


def in_another_process(kind: str, limit: str, number: int) -> list[dict[str, Any]]:
    """As `try_sizes`, in a process that may mount; PermissionError where the system allows none."""
    words = [sys.executable, __file__, kind, limit, str(number)]
    surroundings = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode == 77:
        raise PermissionError(done.stderr)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if sys.argv[2] == "disk":
        try:
            enter_own_mounts()
        except OSError as error:
            sys.stderr.write(f"a file system cannot be mounted here: {error}")
            sys.exit(77)
    sys.stdout.write(json.dumps(try_sizes(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
