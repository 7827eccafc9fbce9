"""A process of its own: interrupts end with 130 and one line, and output that is lost is an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from depthscope.app.cli.command import BUG, INTERRUPTED, PIPE_CLOSED, USAGE
from depthscope.app.cli.main import main

COMMAND = [sys.executable, "-m", "depthscope"]


def _shell(line: str, **options) -> subprocess.CompletedProcess:
    """Run a line of a shell, in which $D is our command."""
    return subprocess.run(
        ["bash", "-c", line.replace("$D", " ".join(COMMAND))],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize(
    ("words", "end", "said"),
    [
        ("check RUN", ">/dev/full", "no space left on device"),
        ("check RUN --json", ">&-", "standard output is closed"),
        ("check --help", ">/dev/full", "no space left on device"),
        ("--version", ">&-", "standard output is closed"),
    ],
)
def test_output_that_is_lost_is_an_error_in_one_line(words, end, said, saved):
    done = _shell(f"$D {words.replace('RUN', str(saved / 'residual.zarr.zip'))} {end}")
    assert done.returncode == USAGE
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_that_leaves_is_a_line_and_141():
    # More than a pipe holds, so that something is lost for certain.
    done = _shell(
        "$D --completion bash | (exec <&-; sleep 4); exit ${PIPESTATUS[0]}",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == PIPE_CLOSED
    assert done.stderr == "depthscope: the reader of the output left before all was written\n"


def test_closed_streams_are_no_reason_for_a_traceback(saved):
    assert _shell("$D check nowhere.zarr.zip >&- 2>&- <&-").returncode == USAGE
    done = _shell("$D probe some.module:factory --text - --out new.zarr.zip <&-", cwd=saved)
    assert done.returncode == USAGE
    assert "standard input is closed" in done.stderr


def test_an_endless_standard_input_is_read_up_to_a_limit(saved):
    done = _shell("$D probe some.module:factory --text - --out new.zarr.zip </dev/zero", cwd=saved)
    assert done.returncode == USAGE
    assert "more than 100000000 bytes" in done.stderr


def test_a_terminal_in_ascii_shows_escapes(saved):
    done = _shell(f"PYTHONIOENCODING=ascii $D check {saved / 'hc.zarr.zip'}")
    assert done.stdout.isascii()
    assert "check --fail-on fail" in done.stdout


@pytest.mark.slow(more=1)
@pytest.mark.parametrize("seconds", [0.15, 1.0, 4.0])
def test_an_interrupt_is_130_and_one_line_whatever_is_going_on(seconds, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "study", "--out", str(tmp_path / "runs"), "--minutes", "5"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED, error
    assert error.splitlines()[-1] == "depthscope: interrupted"
    assert "Traceback" not in error
    assert out == ""


def test_an_interrupt_that_other_code_swallows_still_is_130(monkeypatch, saved, capsys):
    def swallowing(paths, **options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy was interrupted and says so in its own way") from None

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", swallowing)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["dashboard", str(saved)]) == INTERRUPTED
    assert capsys.readouterr().err == "depthscope: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), USAGE, "not enough memory"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes"), USAGE, "not enough memory"),
        (RecursionError("maximum depth"), USAGE, "nested too deeply"),
        (KeyError("\x1b[2J" + "x" * 10**5), BUG, r"a bug in depthscope: KeyError: '\x1b[2J"),
        (
            ExceptionGroup("two", [ValueError("a"), TypeError("b")]),
            BUG,
            "a bug in depthscope: ExceptionGroup",
        ),
    ],
    ids=["memory", "memory of torch", "recursion", "hostile text", "group"],
)
def test_every_exception_is_one_honest_line(error, code, said, monkeypatch, saved, capsys):
    def failing(paths, **options):
        raise error

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", failing)
    assert main(["dashboard", str(saved)]) == code
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert len(line) < 2500
