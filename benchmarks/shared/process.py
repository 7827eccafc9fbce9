"""How is a task measured in isolation? In a process of its own with one thread; a crash is a result too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# More threads than cores of a busy machine make times depend on its other processes.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# The root of the repository: ``python -m`` finds the package in the working directory, wherever the benchmark started.
ROOT = Path(__file__).resolve().parents[2]


class CannotTakeError(Exception):
    """Why a tool is not measured."""


def reason(failure: Exception) -> str:
    """Why a tool failed, in a line."""
    if isinstance(failure, ModuleNotFoundError):
        return "not installed"
    first = (str(failure).strip() or repr(failure)).splitlines()[0]
    return first if isinstance(failure, CannotTakeError) else f"{type(failure).__name__}: {first[:100]}"


def ask(module: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run one task of a benchmark in a new process.

    ``module``: run by ``python -m``; it takes ``--worker`` with the task as JSON, and prints the answer last.
    ``task``: arguments of the benchmark's ``work``.
    Returns: The answer, or the ``reason`` why there is none.
    """
    command = [sys.executable, "-m", module, "--worker", json.dumps(task)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD, cwd=ROOT
    )
    # Tools print to stdout too: the answer is the last line.
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    message = (done.stderr.strip().splitlines() or ["no message"])[-1].replace(f"{ROOT}/", "")
    return {"reason": f"crashed: {message[:150]}"}
