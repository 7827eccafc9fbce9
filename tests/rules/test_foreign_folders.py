"""Does opening or writing in a folder that somebody sends leave everything outside of it alone, whatever links are in it?"""

from __future__ import annotations

import ast
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from depthscope.app.cli.main import main
from depthscope.app.readings.kept_readings import keep, kept_readings
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import list_runs, open_run, save_run
from tests.models.synthetic_run import synthetic_run

ROOT = Path(__file__).parents[2]
ONLY_HERE = "diagnostics/atomic_writes.py"
FORBIDDEN = {
    "iterdir",
    "rmtree",
    "unlink",
    "remove",
    "rename",
    "renames",
    "replace",
    "rmdir",
    "removedirs",
    "move",
}
METHODS = {"iterdir", "unlink", "rmdir"}  # of a Path, whatever its name; `remove` is a list's as well
ALLOWED = {
    ("probes/checkpoints/own_files.py", "iterdir"): "lists the files of a checkpoint, which are read",
    ("probes/history.py", "iterdir"): "lists checkpoints, which are read",
}


def calls(path: Path) -> Iterator[str]:
    """What a file calls that removes, moves or lists files, or takes a folder that is there already."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        if name in METHODS or (name in FORBIDDEN and owner in ("os", "shutil")):
            yield name
        if name in ("mkdir", "makedirs") and any(
            keyword.arg == "exist_ok" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
        ):
            yield f"{name}(exist_ok)"


def test_one_module_alone_removes_moves_and_takes_over_what_is_there():
    found = set()
    for room in ("app", "diagnostics", "probes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found |= {(name, call) for call in calls(path) if name != ONLY_HERE}
    assert found - set(ALLOWED) == set()


# --- every door through which something is written, with links in each place


SMALL = {"layers": 1, "samples": 2, "tokens": 4, "features": 8}


def _record(folder: Path, **options) -> None:
    torch = pytest.importorskip("torch")
    from depthscope import probes

    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with probes.record(model, store=folder / "live", **options) as recorder:
        for _ in range(2):
            model(torch.ones(2, 6, 8))
            recorder.step()


def _keep(folder: Path) -> None:
    path = folder / "run.zarr"
    with open_run(path) as run:
        readings = read_runs({"run": run})
    keep(path, FileVersion.of(path), readings)
    kept_readings(path, FileVersion.of(path))


def _command(*words: str) -> Callable[[Path], object]:
    return lambda folder: main([word.replace("HERE", str(folder)) for word in words])


DOORS: dict[str, Callable[[Path], object]] = {
    "save_run": lambda folder: save_run(synthetic_run("residual", **SMALL), folder / "run.zarr", force=True),
    "save_run zip": lambda folder: save_run(synthetic_run("residual", **SMALL), folder / "new.zarr.zip"),
    "record": lambda folder: _record(folder, force=True),
    "resume": lambda folder: _record(folder, resume=True),
    "analyze": _command("analyze", "HERE/run.zarr", "--metrics", "residual_norm"),
    "export": _command("export", "HERE/run.zarr", "--out", "HERE/paper", "--force"),
    "report": _command("export", "HERE/run.zarr", "--out", "HERE/report.html", "--force"),
    "dashboard's cache": _keep,
    "list_runs": list_runs,
}
# What the earlier code locked while it put something in place, whose name anyone can compute.
LOCKED = hashlib.sha256(b"replacing run.zarr").hexdigest()[:16]
PLACES = {
    "scratch folders": (
        *(".depthscope", f".depthscope-{LOCKED}", ".depthscope-dead/old", ".depthscope-dead/new"),
        *("live/states", "live/.depthscope-dead/old", "paper/figures"),
    ),
    "in the run": ("run.zarr/trace/residual", "live/columns", "live/rows.log", "paper", "report.html"),
    "a group": ("run.zarr/trace", "live/writer.lock", "live/depthscope-rows.log", "new.zarr.zip"),
    "whole folders": ("live", "run.zarr"),
}


def facts(folder: Path) -> dict[str, tuple]:
    """Everything that is in a folder, with its content and inode."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> Path:
    """A folder as somebody made it: a run, a live store, a bundle."""
    folder = tmp_path_factory.mktemp("sent")
    save_run(synthetic_run("hc", **SMALL), folder / "run.zarr")
    _record(folder)
    (folder / "paper").mkdir()
    (folder / "paper" / "manifest.json").write_text('{"made_by": "depthscope export", "files": {}}')
    return folder


def plant(link: Path, victim: Path) -> None:
    """Put a link to somebody's file or folder in a place."""
    if link.is_dir():
        shutil.rmtree(link)
    elif link.exists():
        link.unlink()
    link.parent.mkdir(exist_ok=True)
    is_file = link.suffix in (".log", ".lock", ".html", ".zip")
    link.symlink_to(victim / "diary.txt" if is_file else victim)


@pytest.mark.filterwarnings("ignore::depthscope.probes.ProbeWarning")
@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("door", DOORS)
def test_no_file_outside_of_the_folder_moves_or_vanishes(door, places, sent, tmp_path):
    victim, folder = tmp_path / "home", tmp_path / "sent"
    (victim / "new" / "run.zarr").mkdir(parents=True)
    for name in ("diary.txt", "trace", "lock", "new/run.zarr/thesis.tex", "old.txt", "000001.zarr.zip"):
        (victim / name).write_text(f"mine: {name}")
    shutil.copytree(sent, folder)
    for place in PLACES[places]:
        plant(folder / place, victim)
    if places == "scratch folders":  # also as a writer leaves it that was killed between its two renames
        (folder / ".depthscope-moved").mkdir()
        for name in ("old", "new"):
            (folder / ".depthscope-moved" / name).symlink_to(victim)
    before = facts(victim)
    with suppress(OSError, ValueError):
        DOORS[door](folder)
    # Of a link that is named itself, the file that it points to is written anew where the user says so.
    written_by_name = {"diary.txt"} if (door, places) == ("report", "in the run") else set()
    now = facts(victim)
    assert now.keys() == before.keys()
    assert {name: now[name] for name in before.keys() - written_by_name} == {
        name: before[name] for name in before.keys() - written_by_name
    }
