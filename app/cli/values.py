"""What may the value of an argument be? Types for `add_argument(type=…)`: a wrong value is refused before any work.

A type is called with what was typed, and knows it for what it is without a look at the disk or an import. What needs
either is in its `check`, which `check_arguments` calls for every argument before the command runs. A command that uses these
types needs no check of its own, and an argument without a type is a `Text`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.app.text.terminal import printable
from depthscope.diagnostics.errors import InputError

# Longer than any path that Linux takes (4096 bytes), and than any sensible name.
MAX_CHARACTERS = 4096
# float() and int() also take "1_000", " 7 ", "nan", "inf" and digits of other scripts, which are typing errors here.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_SPAN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
_PART = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


def quoted(text: str) -> str:
    """What was typed, in quotes, as one short line."""
    return f"'{printable(text, longest=120)}'"


def require_text(text: str) -> str:
    """Refuse what no name, label or path can be.

    Raises InputError: For nothing but spaces, a NUL character, bytes that are not UTF-8, or more than `MAX_CHARACTERS`.
    """
    if not text.strip():
        raise InputError(f"{quoted(text)} is empty; give a value, or leave the option out")
    if "\0" in text:
        raise InputError(f"{quoted(text)} has a NUL character in it, which no name can have; leave it out")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{quoted(text)} has {len(text)} characters; give at most {MAX_CHARACTERS}")
    try:
        text.encode()
    # JSON cannot store such a name, and every one of them would be a special case further on.
    except UnicodeEncodeError:
        raise InputError(f"{quoted(text)} is not UTF-8; rename the file, or type the name again") from None
    return text


@dataclass(frozen=True)
class Text:
    """Any value with something in it: the type of an argument that declares none."""

    def __call__(self, text: str) -> str:
        """The text itself."""
        try:
            return require_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Number:
    """A number in a range; an integer unless `whole` is false.

    ``lowest``, ``highest``: the range, ends included.
    ``whole``: whether fractions are refused.
    ``meaning``: what the ends are, for the message, such as ``"minutes, at most a week"``.
    """

    lowest: float
    highest: float
    whole: bool = True
    meaning: str = ""

    def __call__(self, text: str) -> float:
        """The number.

        Raises ArgumentTypeError: For what is no number in plain ASCII digits, or not in the range.
        """
        kind = "whole number" if self.whole else "number"
        expected = f"give a {kind} from {self.lowest} to {self.highest}"
        if self.meaning:
            expected += f" ({self.meaning})"
        if not (_WHOLE if self.whole else _NUMBER).fullmatch(text):
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a {kind}; {expected}")
        # Python refuses to read more than 4300 digits; forty are beyond every range here.
        value = float(text) if not self.whole or len(text) > 40 else int(text)
        if not self.lowest <= value <= self.highest:
            wrong = "not positive" if value <= 0 < self.lowest else "out of range"
            raise argparse.ArgumentTypeError(f"{printable(text, longest=40)} is {wrong}; {expected}")
        return value


@dataclass(frozen=True)
class Spans(Text):
    """Integers from 0 on and spans of them, such as ``3,5-7``, as a list without repetitions.

    ``highest``: the largest number.
    """

    highest: int = 99_999

    def __call__(self, text: str) -> list[int]:  # type: ignore[override]
        """The numbers."""
        wrong = argparse.ArgumentTypeError(
            f"{quoted(text)} names no numbers; give such as 3 or 3,5-7, from 0 to {self.highest}"
        )
        numbers: dict[int, None] = {}
        for part in text[:MAX_CHARACTERS].split(","):
            found = _SPAN.fullmatch(part.strip())
            if found is None or len(text) > MAX_CHARACTERS:
                raise wrong
            first, last = int(found[1]), int(found[2] or found[1])
            if not first <= last <= self.highest:
                raise wrong
            numbers.update(dict.fromkeys(range(first, last + 1)))
        return list(numbers)


@dataclass(frozen=True)
class Part(Text):
    """One of several equal parts, such as ``2/8``, as two numbers."""

    highest: int = 100_000

    def __call__(self, text: str) -> tuple[int, int]:  # type: ignore[override]
        """Which part, from 1, and how many there are."""
        found = _PART.fullmatch(text[:40])
        if found is None or not 1 <= int(found[1]) <= int(found[2]) <= self.highest:
            raise argparse.ArgumentTypeError(
                f"{quoted(text)} is not a part; expected such as 2/8, from 1/1 to {self.highest}/{self.highest}"
            )
        return int(found[1]), int(found[2])


@dataclass(frozen=True)
class ByteCount:
    """A number of bytes such as ``500MB`` (10⁶) or ``2GiB`` (2³⁰)."""

    def __call__(self, text: str) -> int:
        """The number of bytes."""
        found = _SIZE.fullmatch(text) if len(text) <= 40 else None
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{quoted(text)} is not a number of bytes; give such as 500MB or 2GiB"
            )
        number, prefix, binary = found.groups()
        power = " kmgt".index((prefix or " ").lower())
        size = int(float(number) * (1024 if binary else 1000) ** power)
        if not 0 < size < 2**63:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is out of range; give such as 500MB or 2GiB")
        return size


@dataclass(frozen=True)
class Checked:
    """A type that has a `check`: of the value that was parsed, before the command runs."""

    def __call__(self, text: str) -> Any:
        """What the argument becomes."""
        return text

    def check(self, value: Any, option: str, args: argparse.Namespace) -> None:
        """Refuse a value by what is installed or on disk."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneOf(Checked):
    """One label of several.

    ``labels``: returns them. It may import their declaration: it is called when the option was given, never for help.
    """

    labels: Callable[[], Sequence[str]]

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse another label; see `Checked.check`."""
        labels = self.labels()
        if value not in labels:
            raise InputError(
                f"no {option} {quoted(value)}; expected one of {', '.join(labels)}{_nearest(value, labels)}"
            )


def _nearest(value: str, labels: Sequence[str]) -> str:
    from depthscope.diagnostics.closest_names import did_you_mean

    advice = did_you_mean(value[:100], labels)
    return f"; {advice}" if advice.startswith("closest") else ""


@dataclass(frozen=True)
class Names(Checked):
    """Names with commas between them, as a list.

    ``noun``: what they name, for the message.
    ``labels``: returns the names that there are; any name is taken without it.
    """

    noun: str = "name"
    labels: Callable[[], Iterable[str]] | None = None

    def __call__(self, text: str) -> list[str]:
        """The names.

        Raises ArgumentTypeError: Where no name is left, or one is no `Text`.
        """
        names = [name.strip() for name in text.split(",") if name.strip()]
        # `--metrics ""` must not mean every metric.
        if not names:
            raise argparse.ArgumentTypeError(
                f"{quoted(text)} names nothing; give one name or several with commas between, or leave the option out"
            )
        return [Text()(name) for name in names]

    def check(self, value: Sequence[str], option: str, args: argparse.Namespace) -> None:
        """Refuse a name that there is not, with the closest one; see `Checked.check`."""
        if self.labels is None:
            return
        from depthscope.diagnostics.closest_names import did_you_mean

        known = list(self.labels())
        for name in value:
            if name not in known:
                raise InputError(f"no {self.noun} {quoted(name)}; {did_you_mean(name[:100], known)}")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Call the check of every argument that has one, before the command runs."""
    # Where it goes first: it is the cheapest to know, and the dearest to learn after the work. Options before what is read.
    for action in sorted(
        parser._actions, key=lambda action: 0 if action.dest == "out" else 1 if action.option_strings else 2
    ):
        value = getattr(args, action.dest, None)
        if value is None or not isinstance(action.type, Checked):
            continue
        option = action.option_strings[-1] if action.option_strings else str(action.metavar)
        # A list of one argument (RUN …) is checked one by one; one of `Names` is a value.
        values = value if action.nargs in ("+", "*") else [value]
        for each in values:
            action.type.check(each, option, args)
