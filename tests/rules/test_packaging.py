"""Does the package install what it promises, and does nothing of the user's get in its way?"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Our rooms have these names in the checkout, and a user's project may well have them too.
OWN_FOLDERS = ("app", "probes", "diagnostics", "tests")


def run(*command: object, folder: Path, fails: bool = False) -> str:
    """What a command prints, in an environment without this checkout's path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    clean["PIP_NO_COMPILE"] = (
        "0"  # 0: not done. Of torch alone it takes a minute, and a few of its modules are imported
    )
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel that is built from it, and the wheel of the checkout itself."""
    # Both wheels: a file that the sdist lacks is missing in the first only.
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", out / "sdist", ROOT, folder=out)
    run(sys.executable, "-m", "build", "-qw", "--no-isolation", "--outdir", out / "wheel", ROOT, folder=out)
    (sdist,), (wheel,) = out.glob("sdist/*.tar.gz"), out.glob("sdist/*.whl")
    (direct,) = out.glob("wheel/*.whl")
    return {"sdist": sdist, "wheel": wheel, "direct": direct}


def sources() -> set[str]:
    """Every file of the package in the checkout, by its place in a wheel."""
    listed = run("git", "ls-files", "probes", "diagnostics", "app", folder=ROOT).split()
    present = {f"depthscope/{path}" for path in listed if (ROOT / path).exists()}
    return present | {"depthscope/__init__.py", "depthscope/__main__.py", "depthscope/py.typed"}


def test_wheel_and_sdist_hold_every_file_under_one_name(built):
    for name in ("wheel", "direct"):
        with zipfile.ZipFile(built[name]) as archive:
            files = {path for path in archive.namelist() if ".dist-info/" not in path}
        assert files == sources()
    with tarfile.open(built["sdist"]) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    inside = {member.name.partition("/")[2]: member for member in members}
    assert {path for path in inside if path.startswith("depthscope/")} == sources()
    # The checkout's depthscope/ consists of links, which would point to nothing in an archive.
    assert not any(member.issym() for member in members)
    assert not {path.partition("/")[0] for path in inside} & {*OWN_FOLDERS, "benchmarks"}


def test_a_checkout_without_links_is_refused_and_both_ways_on_work(tmp_path):
    """As git leaves it with core.symlinks=false: each link is a small file."""
    clone = tmp_path / "clone"
    run("git", "clone", "-q", "-c", "core.symlinks=false", ROOT, clone, folder=tmp_path)
    build = "import hatchling.build as b, sys; b.{}(sys.argv[1])"
    for code in (build.format("build_editable"), "import depthscope"):
        refused = run(sys.executable, "-c", code, tmp_path, folder=clone, fails=True)
        assert "links app, diagnostics, probes are no folders" in refused
        assert "pip install . (without -e)" in refused
    run(sys.executable, "-c", build.format("build_wheel"), tmp_path, folder=clone)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "depthscope/probes/__init__.py" in archive.namelist()
    shell = refused.partition("in a clone: ")[2].partition(" (Windows")[0]
    run("sh", "-c", shell, folder=clone)
    run(sys.executable, "-c", build.format("build_editable"), tmp_path, folder=clone)
    run(sys.executable, "-c", "import depthscope.probes", folder=clone)
