"""Do the tests pass with the lowest versions that pyproject.toml allows? Makes an environment of them, and runs the tests.

    python .ci/lowest.py FOLDER                      # makes the environment there, runs the quick tests
    python .ci/lowest.py FOLDER tests/app/cli -x     # or what pytest is asked to run

It needs uv (`pip install uv`), which knows how to choose the lowest version of everything that is named here and the newest
of what those need. Linux gets torch's CUDA build: 3 GB to fetch, 6 GB on the disk. An environment that is there is kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"  # of requires-python
QUICK = ["-n", "2", "-q", "-m", "not slow and not model and not browser", "tests"]


def main(folder: Path, tests: list[str]) -> int:
    """Make the environment where there is none, say what it holds, run the tests in it.

    Parameters
    ----------
    folder : Path
        Of the environment.
    tests : list of str
        Arguments of pytest; by default the quick tests.

    Returns
    -------
    int
        The exit code of pytest.
    """
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv is not installed; it chooses the lowest versions: pip install uv")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([uv, "venv", "-q", "--python", PYTHON, folder], check=True)
        lowest = ["--resolution", "lowest-direct", "-e", f"{ROOT}[test]"]
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *lowest], check=True)
    subprocess.run([uv, "pip", "list", "--python", python], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [python, "-m", "pytest", *(tests or QUICK)], cwd=ROOT, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
