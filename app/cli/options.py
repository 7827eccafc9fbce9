"""Which options do several commands share? Each is declared here once; those of a model and its text are one group."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthscope.app.text.terminal import (
    columns,
    command_line,
    encodable,
    printable,
    remark,
    say,
    show_rows,
    working,
)
from depthscope.diagnostics.errors import AbsentError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from depthscope.app.figures import Selection
    from depthscope.app.readings.readings import Reading
    from depthscope.probes.checkpoints.load import LoadedModel

WIDTH = 100
"""Columns at which running text is wrapped."""

SAMPLE_TEXT = "pydoc_data.topics"
"""The module of Python whose text is run where none is given."""

MAX_TEXT_BYTES = 100_000_000
"""A text of this size gives some ten million tokens; a capture reads a few thousand."""

_OUTSIDE_OF_BRACKETS = re.compile(r",(?![^{(]*[})])")
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


def byte_count(text: str) -> int:
    """A number of bytes such as ``500MB`` (10⁶) or ``2GiB`` (2³⁰)."""
    found = _SIZE.fullmatch(text[:40])
    if found is None:
        raise typer.BadParameter(f"got {printable(text, longest=40)!r}; expected bytes such as 500MB or 2GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower()))


def spans(text: str) -> list[int]:
    """Integers from 0 on and spans of them, such as ``3,5-7``."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        found = _SPAN.fullmatch(part.strip())
        if found is None or int(found[1]) > int(found[2] or found[1]):
            raise InputError(f"got {printable(text, longest=80)!r}; expected numbers such as 3 or 3,5-7")
        numbers.update(dict.fromkeys(range(int(found[1]), int(found[2] or found[1]) + 1)))
    return list(numbers)


def names(text: str | None) -> list[str] | None:
    """Names with commas between them; commas in brackets are parts of a name, such as ``blocks.{0,4}.mid``."""
    return None if text is None else [name.strip() for name in _OUTSIDE_OF_BRACKETS.split(text)]


def option(metavar: str, about: str, **settings: Any) -> Any:
    """An option that takes a value."""
    return typer.Option(metavar=metavar, help=about, **settings)


Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="A run, or a folder of runs.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
MaxBytes = Annotated[
    int | None,
    option(
        "BYTES",
        "Refuse a run whose arrays take more, such as 500MB or 2GiB (default: a limit by the size of its files).",
        parser=byte_count,
    ),
]
Metrics = Annotated[str | None, option("A,B", "Only these metrics (default: all that the run has data for).")]
Select = Annotated[
    str | None,
    option(
        "KEY=VALUE,…",
        "Which version of the numbers: scope=sequence|data, tokens=all|ordinary, centering=raw|centred, "
        "reduction=mean|median|p1|p99|max, step=N.",
    ),
]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the address in a browser.")]


def selection_of(select: str | None) -> Selection:
    """The slice that ``--select`` asks for, with the figures' defaults for what is not given."""
    from depthscope.app.figures import Selection

    choices: dict[str, Any] = {}
    for part in names(select) or []:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"--select has {printable(part, longest=80)!r}; expected KEY=VALUE, such as scope=data"
            )
        choices[name] = int(value) if name == "step" and value.isdecimal() else value
    return Selection.of(choices)


def read_several(
    runs: list[Path], max_bytes: int | None, what: str, *, least: int = 1
) -> tuple[list[Reading], list[dict[str, str]]]:
    """Open, analyse and judge runs; those that are left out are printed on stderr.

    ``what``: what is going on, for a person who waits.
    ``least``: how many readings are needed; fewer runs are refused before one is analysed.
    Returns: The readings; and ``{"run": name, "why": reason}`` for each run that was left out, the form of ``--json``.
    """
    from depthscope.app.readings.readings import find_runs, read_paths

    for run in runs:  # a typing error is answered before any run is judged
        if not os.path.lexists(run):
            raise AbsentError(f"no run at {printable(run, longest=200)}; name a run, or a folder of runs")
    paths = [str(run) for run in runs]
    too_few = InputError("got 1 run to compare; expected two or more, or a folder of them")
    if len(find_runs(paths)) < least:
        raise too_few
    with working(what) as progress:
        readings, reasons = read_paths(paths, max_bytes=max_bytes, progress=progress)
    for name, why in reasons.items():
        remark(f"left out {name}: {why}")
    if len(readings) < least:
        raise too_few
    return readings, [{"run": name, "why": why} for name, why in reasons.items()]


def say_cards(reading: Reading) -> None:
    """Print the findings of a reading."""
    from depthscope.app.tables.findings import NOTHING, cards_of
    from depthscope.app.text.cards import cards_text

    say()
    say(cards_text(cards_of(reading), width=columns(), shown=encodable) or NOTHING)
    say()


def say_table(caption: str, printed: pd.DataFrame) -> None:
    """Print a table below its caption."""
    say(textwrap.fill(caption, WIDTH))
    show_rows(list(map(str, printed)), printed.astype(str).to_numpy().tolist())
    say()


def say_next(path: Path) -> None:
    """Print what to do with a run that was saved."""
    say(f"Next: {command_line('check', path)}")
    say(f"      {command_line('dashboard', path)}")


# --- a model and its text


@dataclass(frozen=True)
class ModelAndText:
    """The options that name a model, how it is read, and the text that it runs; `with_model` gives them to a command."""

    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A transformers folder, .gguf file, organisation/name on the Hugging Face hub (@revision), module:factory "
            "(imports and runs that code: only what you trust), or the word smollm2.",
            show_default=False,
        ),
    ]
    weights: Annotated[Path | None, option("FILE", "State dict for module:factory.")] = None
    layers: Annotated[
        str | None, option("PATH", "Module path of the blocks, such as model.layers (default: found).")
    ] = None
    layout: Annotated[
        str | None, option("AXES", "Axes of the state, such as 'B T N D' (default: found).")
    ] = None
    streams: Annotated[
        int | None, option("N", "Number of streams, where the layout merges them with another axis.", min=1)
    ] = None
    sites: Annotated[
        str | None,
        option(
            "NAMES",
            "Sites to record, such as mid,final or 'blocks.{0,4,8}.hook_resid_post' (default: all states).",
        ),
    ] = None
    device: Annotated[str, option("cpu|cuda|…", "Torch device.")] = "cpu"
    dtype: Annotated[
        str | None, option("float32|bfloat16|float16|float64", "Precision of the model (default its own).")
    ] = None
    text: Annotated[
        str | None,
        option("FILE", "UTF-8 text to run; - for stdin (default: English that comes with Python)."),
    ] = None
    sequences: Annotated[int, option("N", "Sequences to run.", min=1)] = 8
    length: Annotated[int, option("T", "Tokens per sequence.", min=2)] = 256
    seed: Annotated[int, option("N", "Seed of the sampled sequences.", min=0)] = 0
    others: tuple[str, ...] = ()
    """Further checkpoints, of a command that takes several; no option."""

    @property
    def read_as(self) -> dict[str, Any]:
        """How the model is read: of layers, layout and streams what was given; the rest is found."""
        given = {name: getattr(self, name) for name in ("layers", "layout", "streams")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def text_name(self) -> str:
        """The name of the text for the attributes of a run: no path, which would show who its author is."""
        if self.text is None:
            return SAMPLE_TEXT
        return "stdin" if self.text == "-" else Path(self.text).name

    def load(self) -> LoadedModel:
        """The model with its tokenizer."""
        with working("importing torch"):  # seconds in which nothing else would be printed
            from depthscope.probes.checkpoints.hub import is_hub_name
            from depthscope.probes.checkpoints.load import load_checkpoint
        _require_device(self.device)
        # What is fetched has a bar of its own, which a spinner would break.
        with nullcontext() if is_hub_name(self.checkpoint) else working(f"loading {self.checkpoint}"):
            weights = None if self.weights is None else str(self.weights)
            return load_checkpoint(self.checkpoint, weights=weights, dtype=self.dtype, device=self.device)

    def read_text(self) -> str:
        """The text of the file, of stdin, or English that comes with Python."""
        if self.text is None:
            with working("importing torch"):
                from depthscope.probes.checkpoints.text_batch import sample_text
            return sample_text()
        if self.text == "-":
            raw = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            # Reading a pipe may wait for ever.
            if os.path.exists(self.text) and not os.path.isfile(self.text):
                raise InputError(f"--text {self.text} is no file; name one, or pipe the text into --text -")
            with open(self.text, "rb") as file:
                raw = file.read(MAX_TEXT_BYTES + 1)
        if len(raw) > MAX_TEXT_BYTES:
            raise InputError(f"--text {self.text} has more than {MAX_TEXT_BYTES} bytes; give a part of it")
        try:
            # No guess at another encoding: wrong characters would be other tokens, without an error.
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"--text {self.text} is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        if not text.strip():
            raise InputError(f"--text {self.text} contains no text; expected a few thousand words of UTF-8")
        return text

    def batch(self, loaded: LoadedModel, text: str) -> dict[str, Any]:
        """Sequences of the text as tokens of the model."""
        from depthscope.probes.checkpoints.text_batch import encode_text

        return encode_text(loaded, text, sequences=self.sequences, length=self.length, seed=self.seed)


def with_model(
    *, several: bool = False, **defaults: Any
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options of `ModelAndText`, which it receives as its first argument.

    ``several``: whether it takes more than one checkpoint.
    ``defaults``: of single options, where the command has others.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        hints = inspect.get_annotations(ModelAndText, eval_str=True)
        if several:
            hints["checkpoint"] = Annotated[list[str], *hints["checkpoint"].__metadata__]
        options_of_model = fields(ModelAndText)[:-1]
        group = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=hints[each.name],
                default=inspect.Parameter.empty
                if each.name == "checkpoint"
                else defaults.get(each.name, each.default),
            )
            for each in options_of_model
        ]

        @wraps(command)
        def run(**options: Any) -> int:
            given = {each.name: options.pop(each.name) for each in options_of_model}
            if several:
                given["checkpoint"], *given["others"] = given["checkpoint"]
            return command(ModelAndText(**given), **options)

        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        run.__signature__ = inspect.Signature([*group, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*group, *own)}
        del run.__wrapped__  # its signature is another one
        return run

    return decorate


def _require_device(device: str) -> None:
    import torch

    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    kind, _, number = device.partition(":")
    if kind not in counts or not (number or "0").isdecimal() or int(number or 0) >= counts[kind]:
        present = [f"{name}:{index}" for name, count in counts.items() for index in range(count)]
        raise InputError(
            f"this machine has no device {printable(device, longest=40)!r}; it has {', '.join(present)}"
        )


def text_digest(text: str) -> str:
    """The digest of a text that is kept with the run that it was made from."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextmanager
def capture_errors_for_users() -> Iterator[None]:
    """Turn a refused capture, or an error of the model's own code, into an error that is printed as one line.

    Every other error is ours and keeps its traceback.
    """
    from depthscope.probes.checkpoints.errors import is_model_error, own_error
    from depthscope.probes.model.errors import CaptureError

    try:
        # What the model prints in its forward is no result of the command.
        with redirect_stdout(sys.stderr):
            yield
    except CaptureError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a model may call sys.exit
        if not is_model_error(error):
            raise
        raise InputError(own_error("the model", error)) from error
