"""The completion scripts, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from depthscope.app.cli.command import USAGE
from depthscope.app.cli.commands import COMMANDS
from depthscope.app.cli.main import main

# What stands on the line, and what the shell must offer for its last word.
CASES = [
    ("depthscope chec", {"check"}),
    ("depthscope check --fail", {"--fail-on"}),
    ("depthscope check ", {"a.zarr.zip", "two words.zarr.zip"}),
    ("depthscope probe model --text ", {"a.zarr.zip", "notes.txt"}),
    ("depthscope probe model --dtype b", {"bfloat16"}),
    ("depthscope export a.zarr.zip --venue ", {"icml", "neurips", "iclr", "acl", "cvpr", "ieee", "plain"}),
    ("depthscope analyze a.zarr.zip --metrics token_c", {"token_cosine"}),
    ("depthscope compare a.zarr.zip --scope ", {"sequence", "data"}),
    ("depthscope --completion ", {"bash", "zsh", "fish"}),
]
_BASH = r"""
source ./script
name=$(complete -p depthscope | sed 's/.*-F \([^ ]*\).*/\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*"
COMP_POINT=${#COMP_LINE} COMPREPLY=()
$name depthscope "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main(["--completion", shell])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.zarr.zip", "two words.zarr.zip", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _offered(*words: str) -> set[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return set(done.stdout.splitlines())


def test_bash_completes_commands_options_files_and_labels(folder, capsys):
    (folder / "script").write_text(script("bash", capsys))
    for line, expected in CASES:
        offered = _offered("bash", "--norc", "-c", _BASH, "bash", *line.split(" "))
        assert expected <= offered, line
    # A run is asked for: a text is none.
    assert "notes.txt" not in _offered("bash", "--norc", "-c", _BASH, "bash", "depthscope", "check", "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_options_files_and_labels(folder, capsys):
    (folder / "script").write_text(script("fish", capsys))
    for line, expected in CASES:
        offered = _offered(
            "fish", "--no-config", "-c", f"source ./script; complete -C '{line}' | string split -f1 \\t"
        )
        assert expected <= offered, line


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_the_script(folder, capsys):
    (folder / "script").write_text(script("zsh", capsys))
    line = 'autoload -U compinit; compinit -u -D; eval "$(<./script)"; print -r -- ${_comps[depthscope]}'
    assert _offered("zsh", "-f", "-c", line) == {"_shtab_depthscope"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_in_the_script(shell, capsys):
    text = script(shell, capsys)
    assert all(command.name in text for command in COMMANDS)


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--completion", "powershell"])
    assert left.value.code == USAGE
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err
