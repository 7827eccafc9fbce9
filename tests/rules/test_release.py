"""Do the files of a release agree, and does the lock of versions hold what the package asks for?"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_and_date_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    (date,) = re.findall(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert version == PROJECT["version"]
    assert f"\n## [{version}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_pages_install_from_a_checkout_or_this_versions_wheel():
    """The name is on no index: a command with it installs nothing today, and somebody else's package one day."""
    pages = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
    commands = {
        (path.name, command)
        for path, text in pages.items()
        if path.name != "CHANGELOG.md"
        for command in re.findall(r"pip install [^\n`]*", text)
    }
    assert len(commands) > 10
    assert [each for each in commands if re.search(r"[\s'\"]depthscope(?!-)", each[1])] == []
    wheels = {wheel for _, command in commands for wheel in re.findall(r"depthscope-[\w.]+-py3", command)}
    assert wheels == {f"depthscope-{PROJECT['version']}-py3"}


def test_locked_versions_are_those_that_the_package_takes():
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    pinned = [line.split(" --hash=sha256:") for line in lines if not line.startswith("#")]
    assert all(len(digest) == 64 for _, digest in pinned)
    locked = dict(requirement.split("==") for requirement, _ in pinned)
    assert not [version for version in locked.values() if "+" in version], "a local label is on no index"
    asked = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    requirements = [Requirement(text) for text in asked if not text.startswith("depthscope[")]
    wrong = [
        str(one)
        for one in requirements
        if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))
    ]
    assert wrong == []
