"""The command line: what is imported, what is printed on which channel, with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from depthscope.app.cli.main import BUG, COMMANDS, FINE, INTERRUPTED, TERMINATED, USAGE, main
from depthscope.diagnostics import package_versions

HEAVY = ("torch", "streamlit", "plotly", "matplotlib", "xarray", "numpy", "rich")
MOST_OPTIONS = 12


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from depthscope.app.cli.main import main; main(['--help'])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(COMMANDS)
    assert "..." not in done.stdout.partition("Commands:")[2]  # no line of help is cut


def options_in(help_text):
    """The names of the options, one for each pair of opposites."""
    lines = [line.strip() for line in help_text.partition("Options:")[2].splitlines()]
    return [line.split()[0] for line in lines if line.startswith("--") and not line.startswith("--help")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_few_options(command, capsys):
    assert main([command, "--help"]) == FINE
    printed = capsys.readouterr().out
    assert f"Usage: depthscope {command}" in printed
    options = options_in(printed)
    if "--layout" in options:  # the options of a model and its text are one group
        group = options.index("--seed") + 1
        assert options[:group] == [
            *("--weights", "--layers", "--layout", "--streams", "--sites", "--device", "--dtype"),
            *("--text", "--sequences", "--length", "--seed"),
        ]
        options = options[group:]
    assert len(options) <= MOST_OPTIONS


def test_a_bare_call_prints_help_and_the_version_is_one_line(capsys):
    assert main([]) == FINE
    assert "depthscope demo" in capsys.readouterr().out
    assert main(["--version"]) == FINE
    assert capsys.readouterr().out.startswith("depthscope ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chek"], "Did you mean 'check'"),
        (["export", "a.zarr.zip"], "--out"),
        (["probe", "x", "--length", "0"], "--length"),
        (["probe", "x", "--lenght", "3"], "--length"),
        (["check", "a.zarr.zip", "--max-bytes", "many"], "expected bytes such as 500MB"),
    ],
)
def test_wrong_usage_is_two(words, said, capsys):
    assert main(words) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "missing.zarr.zip"], "missing.zarr.zip"),
        (["check", "RUNS/hc.zarr.zip", "--fail-on", "rank_colapse"], "closest: 'rank_collapse'"),
        (["analyze", "RUNS/hc.zarr.zip", "--metrics", "efective_rank"], "closest: 'effective_rank'"),
        (["compare", "RUNS", "--select", "tokens=some"], "expected one of all, ordinary"),
        (["compare", "RUNS", "--select", "data"], "expected KEY=VALUE"),
        (["export", "RUNS", "--out", "OUT/paper", "--venue", "a4"], "expected icml, neurips, iclr"),
        (["ablate", "x", "--blocks", "5-3"], "expected numbers such as 3 or 3,5-7"),
        (["watch", "nowhere.py"], "no script at nowhere.py"),
        (["watch", "--stop-on", "never", __file__], "expected warn or fail"),
    ],
)
def test_bad_input_is_one_clear_line_and_two(words, said, saved, tmp_path, capsys):
    words = [word.replace("RUNS", str(saved)).replace("OUT", str(tmp_path)) for word in words]
    assert main(words) == USAGE
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "pip install -e '/a b/c[app]'"),
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


def test_missing_module_of_no_extra_is_our_fault(monkeypatch, saved, capsys):
    def broken(paths, **options):
        raise ModuleNotFoundError("No module named 'depthscope.app.nowhere'", name="depthscope.app.nowhere")

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", broken)
    assert main(["dashboard", str(saved)]) == BUG
    error = capsys.readouterr().err
    assert "a bug in depthscope: ModuleNotFoundError: No module named 'depthscope.app.nowhere'" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("DEPTHSCOPE_DEBUG", "1")
    assert main(["dashboard", str(saved)]) == BUG
    assert "Traceback" in capsys.readouterr().err


def test_dashboard_hands_its_arguments_on(monkeypatch, saved):
    seen = {}
    monkeypatch.setattr(
        "depthscope.app.dashboard.server.launch", lambda paths, **more: seen.update(more, paths=paths)
    )
    assert main(["dashboard", str(saved), "--port", "8600", "--no-browser", "--max-bytes", "2GiB"]) == FINE
    assert seen == {"paths": [saved], "port": 8600, "open_browser": False, "max_bytes": 2 * 1024**3}


@pytest.mark.skipif(os.name != "posix", reason="processes are ended in another way there")
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
        "write = saving.write_zip\n"
        "def slow(*args):\n"
        "    write(*args)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "saving.write_zip = slow\n"
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
