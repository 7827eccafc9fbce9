"""Do the parts that several processes write join to what one would measure of all data, and is the training untouched?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.probes.training.several_processes import SCENARIOS

WORKER = Path(__file__).with_name("several_processes.py")
SECONDS = 300  # of which starting torch in four processes on two busy cores may take a third

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)


def test_processes(tmp_path):
    """Every scenario in one start of two processes, which takes most of the time."""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failed = {}
    for rank in range(2):
        met = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(met) == {scenario.__name__ for scenario in SCENARIOS}
        failed |= {(rank, scenario): words for scenario, words in met.items() if words}
    assert failed == {}
