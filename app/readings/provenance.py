"""Which software made this? Versions, for manifests, reports and the command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from importlib import metadata
from pathlib import Path

from depthscope.diagnostics.package_versions import package_versions

# Those that compute or draw what a report and a bundle show.
_PACKAGES = ("depthscope", "numpy", "scipy", "xarray", "pandas", "matplotlib")


def depthscope_version() -> str:
    """The installed version.

    Returns: ``"0+source"`` where the code runs without being installed.
    """
    return software()["depthscope"]


def software() -> dict[str, str]:
    """Versions of depthscope and of the packages that compute and draw.

    Returns: Packages that are absent are left out.
    """
    return {"depthscope": "0+source", **package_versions(_PACKAGES)}


def source_commit() -> str:
    """The commit that runs, where depthscope is a checkout of its repository.

    Returns: Forty hexadecimal digits, with ``-dirty`` where files differ from it; of an installed package the commit
    that pip noted; empty where neither is known.
    """
    top = Path(__file__).resolve().parents[2]
    # A virtual environment inside somebody else's repository is no checkout of ours.
    if (top / ".git").exists() and (top / "depthscope" / "__init__.py").exists():
        commit = _git(top, "rev-parse", "HEAD")
        return f"{commit}-dirty" if commit and _git(top, "status", "--porcelain", "-uno") else commit
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        noted = metadata.distribution("depthscope").read_text("direct_url.json")
        return str(json.loads(noted or "{}").get("vcs_info", {}).get("commit_id", ""))
    return ""


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git on this machine
    return done.stdout.strip() if done.returncode == 0 else ""


def file_digest(path: str) -> str:
    """SHA-256 of the file of a run; of a run that is a folder, of its files by name.

    ``path``: A file or folder; empty for a run in memory.
    Returns: Hexadecimal; empty where there is nothing at the path.
    """
    place = Path(path) if path else None
    if place is None or not place.exists():
        return ""
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for each in sorted(entry for entry in place.rglob("*") if entry.is_file()):
        found.update(each.relative_to(place).as_posix().encode() + hashlib.sha256(each.read_bytes()).digest())
    return found.hexdigest()
