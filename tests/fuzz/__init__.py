"""Does bad input get a sentence? Seeded mutators of runs and checkpoints, and how each is answered."""

import os

# Before numpy is imported: a process that is forked should have one thread.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

from tests.fuzz.checkpoints import CHECKPOINTS
from tests.fuzz.kinds import Kind
from tests.fuzz.runs import RUNS

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RUNS, CHECKPOINTS)}
