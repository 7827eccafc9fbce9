"""Does bad input get a sentence? Seeded mutators of runs, checkpoints, command lines and URLs, and how each is answered."""

import os

# Before numpy is imported: a process that is forked should have one thread.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

from tests.fuzz.kinds import Kind  # noqa: E402
from tests.fuzz.runs import RUNS  # noqa: E402

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RUNS,)}
