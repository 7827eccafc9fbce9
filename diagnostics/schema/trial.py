"""Can a doubtful netCDF file be read at all? It is tried in another process, which may crash or never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from depthscope.diagnostics.schema.validation import SchemaError

# Processor time, not time on the clock: a slow or busy machine must not make a good file a damaged one. A small run takes
# 0.05 s; larger ones are read and hashed at several hundred MB/s.
_SECONDS = 4.0
_BYTES_A_SECOND = 50e6
# On the clock, for a file on a disk that does not answer.
_PATIENCE = 15.0
_CHILD = "depthscope.diagnostics.schema.trial_process"


def open_in_trial(path: Path, *, verify: bool, max_bytes: int | None) -> str:
    """Open a run in another process, read all of it there, and return its integrity.

    Raises SchemaError: As in `open_run`, and where the other process crashes or does not end.
    """
    size = path.stat().st_size
    seconds = _SECONDS + size / _BYTES_A_SECOND
    request = {"path": str(path), "verify": verify, "max_bytes": max_bytes, "seconds": seconds}
    try:
        done = subprocess.run(
            # -P: no module of the working folder is imported that this process would not import.
            [sys.executable, "-P", "-m", _CHILD, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            # Depthscope may be found by a path that this process has and a new one has not.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)},
            timeout=_PATIENCE + 4 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SchemaError(f"reading it does not end; {_DAMAGED}") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        # It died by a signal, of the limit on its time among others, before it could answer.
        raise SchemaError(
            f"the HDF5 library fails on it (exit status {done.returncode}); {_DAMAGED}"
        ) from None
    if "error" in answer:
        raise SchemaError(answer["error"])
    return str(answer["integrity"])


_DAMAGED = "it is damaged: copy it again from where it came"
