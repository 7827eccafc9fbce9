"""How is a task measured apart from all others? In a process of its own, with one thread; a crash is an answer too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def ask(module: str, task: dict[str, Any]) -> dict[str, Any]:
    """Let a benchmark work on a task in a process of its own.

    Parameters
    ----------
    module : str
        Run by ``python -m``; it takes ``--worker`` with the task as JSON, and prints the answer as its last line.
    task : dict
        What is asked.

    Returns
    -------
    dict
        The answer, or the ``reason`` why there is none.
    """
    command = [sys.executable, "-m", module, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    message = (done.stderr.strip().splitlines() or ["no message"])[-1].replace(f"{Path.cwd()}/", "")
    return {"reason": f"crashed: {message[:150]}"}
