"""The command line: what is imported, what is printed on which channel, with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from depthscope.app.cli.command import BUG, FINE, INTERRUPTED, TERMINATED, USAGE
from depthscope.app.cli.commands import COMMANDS
from depthscope.app.cli.main import main
from depthscope.app.figures import CHOICES
from depthscope.diagnostics import package_versions

HEAVY = ("torch", "streamlit", "plotly", "matplotlib", "xarray", "numpy", "rich")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from depthscope.app.cli.main import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    printed = " ".join(done.stdout.split())
    assert all(f" {command.name} {command.help} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_runs_the_function_that_it_declares(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command.name, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: depthscope {command.name}" in printed
    assert "--debug" in printed
    assert command.run.__module__ == f"depthscope.app.cli.commands.{command.name}"


def test_the_options_of_a_slice_name_every_label(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    for name in ("scope", "tokens", "centering", "reduction"):
        assert f"--{name} {'|'.join(CHOICES[name])}" in printed


def test_bare_call_prints_help(capsys):
    assert main([]) == 0
    assert "depthscope demo" in capsys.readouterr().out


def test_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("depthscope ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chek"], "did you mean check"),
        (["zzz"], "expected one of demo, probe"),
        (["export", "a.zarr.zip"], "the following arguments are required: --out"),
        (["probe", "x", "--text", "t", "--out", "r.zarr.zip", "--length", "0"], "0 is not positive"),
        (
            ["probe", "x", "--text", "t", "--out", "r.zarr.zip", "--length", "ten"],
            "'ten' is not a whole number",
        ),
        (
            ["analyze", "a.zarr.zip", "--metrics", ""],
            "argument --metrics: '' names nothing; give one name or",
        ),
        (["compare", "a.zarr.zip", "--metrics", " , "], "argument --metrics: ' , ' names nothing"),
        (["check", "a.zarr.zip", "--fail-on", ""], "argument --fail-on: '' names nothing"),
    ],
)
def test_wrong_usage_is_one_line_and_two(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "missing.zarr.zip"], "missing.zarr.zip"),
        (["check", "RUNS/hc.zarr.zip", "--fail-on", "rank_colapse"], "closest: 'rank_collapse'"),
        (["analyze", "RUNS/hc.zarr.zip", "--metrics", "efective_rank"], "closest: 'effective_rank'"),
        (["compare", "RUNS", "--tokens", "some"], "expected one of all, ordinary"),
        (["export", "RUNS", "--out", "OUT/paper", "--venue", "a4"], "expected one of icml, neurips, iclr"),
        (["report", "RUNS", "--out", "OUT/report.pdf"], "expected such as report.html"),
        (["probe", "x", "--text", "missing.txt", "--out", "r.zarr.zip"], "missing.txt: no such file"),
        (["probe", "x", "--text", "missing.txt", "--out", "r.npy"], "ends in .zarr, .zarr.zip"),
    ],
)
def test_bad_input_is_one_clear_line_and_two(words, said, saved, tmp_path, capsys):
    words = [word.replace("RUNS", str(saved)).replace("OUT", str(tmp_path)) for word in words]
    assert main(words) == USAGE
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_foreign_file_is_no_run(tmp_path, capsys):
    (tmp_path / "torn.zarr.zip").write_bytes(b"not a netCDF file")
    assert main(["check", str(tmp_path / "torn.zarr.zip")]) == USAGE
    assert "cannot be read" in capsys.readouterr().err


def test_folder_without_runs_says_how_to_make_one(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == USAGE
    assert "depthscope probe CHECKPOINT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "pip install -e '/a b/c[app]'"),
        ({"url": "file:///c", "dir_info": {}}, "pip install 'depthscope[app] @ file:///c'"),
        ({"url": "file:///d.whl", "archive_info": {}}, "pip install 'depthscope[app] @ file:///d.whl'"),
        (
            {"url": "https://host/d", "vcs_info": {"vcs": "git", "commit_id": "1a"}},
            "pip install 'depthscope[app] @ git+https://host/d'",
        ),
        (None, "pip install 'depthscope[app]'"),  # from an index
    ],
)
def test_missing_extra_is_installed_from_where_depthscope_came(origin, line, monkeypatch, capsys, saved):
    """The name is on no index as long as nobody published it, and may be another's one day."""

    def absent(paths, **options):
        raise ModuleNotFoundError("No module named 'streamlit'", name="streamlit.web")

    text = None if origin is None else json.dumps(origin)
    installed = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(package_versions, "distribution", lambda name: installed)
    monkeypatch.setattr("depthscope.app.dashboard.server.launch", absent)
    assert main(["dashboard", str(saved)]) == USAGE
    assert capsys.readouterr().err.strip() == f"depthscope dashboard needs streamlit: {line}"


def test_a_checkout_that_is_not_installed_is_named(monkeypatch):
    def none(name):
        raise package_versions.PackageNotFoundError(name)

    monkeypatch.setattr(package_versions, "distribution", none)
    root = Path(package_versions.__file__).resolve().parents[1]
    assert package_versions.install_command("app") == f"pip install -e '{root}[app]'"


def test_missing_module_of_no_extra_is_our_fault(monkeypatch, saved, capsys):
    def broken(paths, **options):
        raise ModuleNotFoundError("No module named 'depthscope.app.nowhere'", name="depthscope.app.nowhere")

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", broken)
    assert main(["dashboard", str(saved)]) == BUG
    error = capsys.readouterr().err
    assert "a bug in depthscope: ModuleNotFoundError: No module named 'depthscope.app.nowhere'" in error
    assert error.count("\n") == 1
    assert main(["dashboard", str(saved), "--debug"]) == BUG
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130(monkeypatch, saved, capsys):
    def interrupted(paths, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", interrupted)
    assert main(["dashboard", str(saved)]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_dashboard_hands_its_arguments_on(monkeypatch, saved):
    seen = {}
    monkeypatch.setattr(
        "depthscope.app.dashboard.server.launch", lambda paths, **more: seen.update(more, paths=paths)
    )
    assert main(["dashboard", str(saved), "--port", "8600", "--no-browser", "--max-bytes", "2GiB"]) == FINE
    assert seen == {"paths": [saved], "port": 8600, "open_browser": False, "max_bytes": 2 * 1024**3}


@pytest.mark.skipif(os.name != "posix", reason="processes are ended in another way there")
@pytest.mark.slow(but=1, more=1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_command_that_is_ended_while_it_writes_removes_what_it_wrote(saved, tmp_path, number, code):
    run = tmp_path / "hc.zarr.zip"
    shutil.copy(saved / "hc.zarr.zip", run)
    before = run.read_bytes()
    # The writer stops in the middle of the new file, and waits to be ended.
    program = (
        "import sys, time\n"
        "from depthscope.app.cli.main import main\n"
        "from depthscope.diagnostics.schema import saving\n"
        "write = saving._write_folder\n"
        "def slow(*args):\n"
        "    write(*args)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "saving._write_folder = slow\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "analyze", str(run), "--metrics", "stream_cosine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert run.read_bytes() == before
    assert os.listdir(tmp_path) == ["hc.zarr.zip"]
