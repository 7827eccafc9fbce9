"""Is every damaged file answered by one sentence, and is it seen where one is not?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.outcomes import CRASH, HANG, MEMORY, NOISY, TRACEBACK
from tests.thoroughness import sample_or_every

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    CRASH: "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    HANG: "import time; time.sleep(60)",
    MEMORY: "x = bytearray(b'a' * 400_000_000)",
    TRACEBACK: "1 / 0",
    NOISY: "import sys; print('HDF5-DIAG: error', file=sys.stderr)",
}


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: it is forked for every case, which pytest's threads would not survive."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow(one_in=2)
def test_every_damaged_file_is_answered_by_a_sentence():
    done = _run("-m", "tests.fuzz", "0", str(sample_or_every(12, 20_000)))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_fault_is_seen():
    program = f"""
from tests.fuzz import isolation
from tests.fuzz.outcomes import as_json, of_process, of_call, EQUAL
for outcome, fault in {FAULTS!r}.items():
    def call():
        exec(fault)
        return EQUAL, ''
    print(of_process(isolation.in_child(lambda: as_json([of_call('door', call)]), seconds=1), mib=256)[0])
"""
    done = _run("-c", program)
    assert done.stdout.splitlines() == list(FAULTS), done.stderr
