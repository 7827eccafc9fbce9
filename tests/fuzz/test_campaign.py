"""Is every mutated input answered by a sentence, and does the framework see it where one is not?"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from depthscope.diagnostics import schema
from tests.fuzz.campaign import numbers_of
from tests.fuzz.kinds import NotApplicable
from tests.fuzz.outcomes import CRASH, HANG, MEMORY, NOISY, TRACEBACK
from tests.fuzz.runs import RUNS
from tests.fuzz.runs.base_runs import contents, difference, prepare

# In this process, so of those mutators only that leave it alone even where a check is missing.
QUICK = [name for name in RUNS.mutators if name.startswith(("zarr-json:", "zarr-chunk:", "zip:flip"))]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    prepare(folder, ["tiny"])
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutator", QUICK)
def test_no_mutation_of_the_quick_round_fails(mutator, material, tmp_path):
    try:
        subject = RUNS.mutators[mutator](numbers_of("runs", mutator, 0), material, tmp_path)
    except NotApplicable:
        pytest.skip("nothing to mutate")
    try:
        with schema.open_run(subject["path"]) as run:
            found, verified = contents(run.load()), schema.integrity(run)
    except (ValueError, OSError):
        return  # a sentence
    expected = pickle.loads((material / f"{subject['base']}.expected").read_bytes())
    assert verified != "verified" or difference(found, expected) == ""


@pytest.mark.slow
def test_no_mutation_of_the_long_round_fails():
    """A process of its own: it is forked for every case, which pytest's threads would not survive."""
    words = [sys.executable, "-m", "tests.fuzz", "--minutes", "0.3", "--jobs", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --- the framework itself, in a process without threads

FAULTS = {
    CRASH: "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    HANG: "import time; time.sleep(60)",
    MEMORY: "x = bytearray(b'a' * 400_000_000)",
    TRACEBACK: "1 / 0",
    NOISY: "import sys; print('HDF5-DIAG: error', file=sys.stderr)",
}


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
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == list(FAULTS)


def test_a_case_is_the_same_in_every_campaign(material, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = []
    for name in ("a", "b"):
        subject = RUNS.mutators["nc:several"](numbers_of("runs", "nc:several", 5), material, tmp_path / name)
        files.append(Path(subject["path"]).read_bytes())
    assert files[0] == files[1]
