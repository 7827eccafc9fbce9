"""Has an installed version a known vulnerability? Exit 1 where it has, 3 where the index could not say of a single one."""

# pip-audit alone is not enough: a version that the index does not know is «skipped», and with all of them skipped it still
# prints that no vulnerability was found and leaves with 0. Here every skipped version is counted and said.

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NO_DATA = 3
# Advisory → (why it does not concern us or has no fix, date). Look at each again after half a year.
ALLOWED: dict[str, tuple[str, str]] = {}


def report(document: dict) -> tuple[list[str], int]:
    """What to print, and the exit code.

    Parameters
    ----------
    document : dict
        The JSON of ``pip-audit --format json``.

    Returns
    -------
    list of str
    int
    """
    dependencies = document["dependencies"]
    # The package itself is installed from a folder, and is on no index.
    skipped = [
        entry["name"] for entry in dependencies if "skip_reason" in entry and entry["name"] != "depthscope"
    ]
    asked = [entry for entry in dependencies if "skip_reason" not in entry]
    known = [(entry, found) for entry in asked for found in entry.get("vulns", ())]
    lines, code = [f"audited {len(asked)} of {len(asked) + len(skipped)} packages"], 0
    if not asked:
        return [
            "AUDIT WITHOUT DATA: the index knows no vulnerabilities of any installed package",
            *lines,
        ], NO_DATA
    if skipped:
        lines.append(f"SKIPPED, the index has no answer for: {', '.join(skipped)}")
    for entry, found in known:
        reason = next(
            (ALLOWED[name] for name in (found["id"], *found.get("aliases", ())) if name in ALLOWED), None
        )
        fix = ", ".join(found.get("fix_versions", ())) or "none"
        lines.append(
            f"{entry['name']} {entry['version']}: {found['id']}, fixed in {fix}; "
            + (f"allowed: {reason}" if reason else "NOT allowed")
        )
        code = code if reason else 1
    return lines, code


def main(python: str) -> int:
    """Audit the environment of a Python.

    Parameters
    ----------
    python : str
        Its path; pip-audit is installed in the environment of this script.

    Returns
    -------
    int
    """
    words = [
        sys.executable,
        "-m",
        "pip_audit",
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--timeout",
        "15",
    ]
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    try:
        done = subprocess.run(
            [*words, "--path", site.stdout.strip()], capture_output=True, text=True, timeout=300, check=False
        )
        document = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        sys.stdout.write(
            "AUDIT WITHOUT DATA: the package index could not be asked for known vulnerabilities\n"
        )
        return NO_DATA
    lines, code = report(document)
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))
