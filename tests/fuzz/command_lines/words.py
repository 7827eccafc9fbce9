"""Which command lines is a stranger, a typing error or an attacker likely to give? Drawn from the registered commands."""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

# A valid line of each command, from which one thing at a time is changed. {name} is a file of `make_files`.
BASES = {
    "demo": ["demo", "--quick", "--no-browser", "--out", "{fresh}"],
    "probe": [
        *("probe", "depthscope.app.study.small_lm:residual", "--text", "{text}", "--out", "{fresh}.nc"),
        *("--sequences", "1", "--length", "16", "--no-gradients"),
    ],
    "describe": ["describe", "depthscope.app.study.small_lm:residual"],
    "analyze": ["analyze", "{run}", "--metrics", "residual_norm", "--out", "{fresh}.nc"],
    "check": ["check", "{run}"],
    "compare": ["compare", "{run}"],
    "dashboard": ["dashboard", "{run}", "--no-browser"],
    "report": ["report", "{run}", "--out", "{fresh}.html"],
    "export": ["export", "{run}", "--out", "{fresh}"],
    "study": ["study", "--out", "{fresh}", "--minutes", "0.02"],
}

VALUES = {
    "empty": "",
    "blank": " \t",
    "NUL": "a\0b.nc",
    "newline": "a\nb.nc",
    "escape": "\x1b[2Jred\u202e.nc",
    "surrogate": os.fsdecode(b"\xff\xfe.nc"),
    "long": "x" * 10**5,
    "long name": "x" * 300 + ".nc",
    "unicode digits": "٣",
    "superscript": "²",
    "underscore": "1_000",
    "nan": "nan",
    "inf": "inf",
    "minus inf": "-inf",
    "minus": "-1",
    "zero": "0",
    "half": "0.5",
    "two": "2",
    "huge": str(10**30),
    "trillion": str(10**12),
    "2**64": str(2**64),
    "2**63": str(2**63),
    "1e300": "1e300",
    "1e-320": "1e-320",
    "hex": "0x10",
    "many digits": "9" * 5000,
    "port": "65536",
    "int8": "int8",
    "bool": "bool",
    "complex64": "complex64",
    "float8": "float8_e4m3fn",
    "set_default_dtype": "set_default_dtype",
    "meta": "meta",
    "cuda": "cuda",
    "cuda:99": "cuda:99",
    "vulkan": "vulkan",
    "cpu:-1": "cpu:-1",
    "fifo": "{fifo}",
    "fifo.nc": "{fifo}.nc",
    "full": "/dev/full",
    "devzero": "/dev/zero",
    "devnull below": "/dev/null/x.nc",
    "proc": "/proc/self/mem",
    "kmsg": "/proc/kmsg",
    "proc folder": "/proc/self/fd",
    "in proc": "/proc/x.nc",
    "in sys": "/sys/x.html",
    "folder": "{folder}",
    "folder.nc": "{folder}.nc",
    "dangling": "{dangling}",
    "dangling.nc": "{dangling}.nc",
    "loop": "{loop}",
    "loop.nc": "{loop}.nc",
    "socket": "{socket}",
    "dash": "-",
    "dashes": "--",
    "missing": "{missing}.nc",
    "file": "{text}",
    "file/": "{text}/",
    "run": "{run}",
    "run/": "{run}/",
    "run/x.nc": "{run}/x.nc",
    "torn": "{torn}.nc",
    "newer": "{newer}.nc",
    "mixed": "{mixed}",
    "html": "{html}",
    "quoted": "a b;touch x.nc",
    "commas": ",,,",
    "format": "%s%n{0}",
}
"""Values by what is odd about them; {name} is a file of `make_files`."""


def make_files(folder: Path, good: Path) -> dict[str, str]:
    """Good and bad files in a folder; `good` is a saved run (.nc).

    Returns their paths by the names that `VALUES` and `BASES` use.
    """
    import socket

    import h5py

    names = ("run.nc", "text.txt", "torn.nc", "newer.nc", "page.html")
    paths = {name.partition(".")[0]: folder / name for name in names}
    shutil.copy(good, paths["run"])
    paths["text"].write_text("the quick brown fox jumps over the lazy dog " * 40)
    paths["torn"].write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    shutil.copy(good, paths["newer"])
    with h5py.File(paths["newer"], "a") as file:
        file.attrs["schema_version"] = "99.0"
    paths["page"].write_text("<p>somebody's page")
    mixed = folder / "mixed"
    mixed.mkdir()
    shutil.copy(good, mixed / "good.nc")
    shutil.copy(paths["torn"], mixed / "torn.nc")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    (folder / "folder.nc").mkdir()
    (folder / "folder.nc" / "notes.txt").write_text("mine")
    for ending in ("", ".nc"):
        os.mkfifo(folder / f"fifo{ending}")
        (folder / f"dangling{ending}").symlink_to(folder / f"nowhere{ending}")
        (folder / f"loop{ending}").symlink_to(folder / f"loop{ending}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return {
        "run": str(paths["run"]),
        "text": str(paths["text"]),
        "torn": str(folder / "torn"),
        "newer": str(folder / "newer"),
        "html": str(paths["page"]),
        "mixed": str(mixed),
        "missing": str(folder / "missing"),
        **{name: str(folder / name) for name in ("fifo", "folder", "dangling", "loop", "socket", "fresh")},
    }


def _filled(words: list[str], paths: dict[str, str]) -> list[str]:
    for name, path in paths.items():
        words = [word.replace(f"{{{name}}}", path) for word in words]
    return words


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (action,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(action.choices)


def hostile_line(name: str, paths: dict[str, str], rng: random.Random) -> tuple[str, list[str]]:
    """One hostile line of a command: (what is odd, words)."""
    from depthscope.app.cli.parser import build_parser

    parser = subparsers(build_parser())[name]
    odd, words = rng.choice(list(_lines_of(BASES[name], parser, rng)))
    return odd, _filled(words, paths)


def _lines_of(
    base: list[str], parser: argparse.ArgumentParser, rng: random.Random
) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        for odd, value in VALUES.items():
            yield f"{action.dest}={odd}", _with_value(base, action, value)
        for word in action.option_strings[:1]:
            # A letter lost, two letters exchanged, an abbreviation, twice, with a value that it does not take.
            place = rng.randrange(3, len(word))
            yield f"{word} lost letter", [*base, word[:place] + word[place + 1 :], "x"]
            yield (
                f"{word} exchanged",
                [*base, word[: place - 1] + word[place : place + 1] + word[place - 1] + word[place + 1 :]],
            )
            yield f"{word} short", [*base, word[:4]]
            yield f"{word} twice", [*base, word, "1", word, "2"]
            yield f"{word}=", [*base, f"{word}="]
            yield f"{word} last", [*base, word]
    yield "no words", base[:1]
    yield "one more", [*base, "more"]
    yield "after dashes", [*base, "--", "--json"]


def _with_value(base: list[str], action: argparse.Action, value: str) -> list[str]:
    """The line with one argument's value replaced or added."""
    if not action.option_strings:
        return [base[0], value, *base[2:]]
    option = action.option_strings[0]
    if action.nargs == 0:
        return [*base, f"{option}={value}"]
    if option in base:
        place = base.index(option)
        return [*base[: place + 1], value, *base[place + 2 :]]
    return [*base, option, value]
