"""Which arguments do several commands share? Each is declared here once, with the function that reads it."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthscope.app.figures import Selection


def add_run(parser: argparse.ArgumentParser) -> None:
    """One run file as ``args.run``."""
    parser.add_argument("run", metavar="RUN", help="run file (.nc, .zarr, .zarr.zip)")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Run files and folders of runs as ``args.runs``; `open_runs` opens them."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run file, or a folder of runs")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: the command prints one JSON document on stdout and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def add_browser(parser: argparse.ArgumentParser) -> None:
    """``--no-browser`` as ``args.browser``, true by default."""
    # The positive name: `if args.browser` reads better than a double negative.
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which version of each number is shown; `selection_of` reads them."""
    group = parser.add_argument_group("which version of the numbers")
    # No `choices=`: the labels are declared with the figures, and that import costs xarray. `Selection.of` refuses a
    # wrong label and names the expected ones.
    group.add_argument("--scope", metavar="sequence|data", help="within each sequence, or all tokens pooled")
    group.add_argument("--tokens", metavar="all|ordinary", help="ordinary leaves massive activations out")
    group.add_argument("--centering", metavar="raw|centred", help="centred takes the mean token away")
    group.add_argument(
        "--reduction", metavar="mean|median|p1|p99|max", help="over tokens, for mixing metrics"
    )


def selection_of(args: argparse.Namespace) -> Selection:
    """The slice that `add_selection`'s arguments ask for, with the figures' defaults for those not given.

    Parameters
    ----------
    args : Namespace
        Parsed arguments.

    Returns
    -------
    Selection
    """
    from depthscope.app.figures import Selection

    # Options that were not given are left out, so that the defaults are declared in `Selection` alone.
    given = {name: getattr(args, name) for name in ("scope", "tokens", "centering", "reduction")}
    return Selection.of({name: label for name, label in given.items() if label is not None})


def metric_names(names: list[str] | None) -> list[str] | None:
    """Names of metrics, checked against the catalogue.

    Parameters
    ----------
    names : list of str or None
        Names as given on the command line; None where the option was left out.

    Returns
    -------
    list of str or None
        The same names.

    Raises
    ------
    ValueError
        For a name that is no metric, with the closest one.
    """
    from depthscope.diagnostics import CATALOGUE
    from depthscope.diagnostics.closest_names import did_you_mean

    for name in names or ():
        if name not in CATALOGUE:
            raise ValueError(f"no metric {name!r}; {did_you_mean(name, CATALOGUE)}")
    return names


def require_run_name(out: str, *, suffixes: Collection[str], source: str | None = None) -> None:
    """Refuse a name under which no run can be saved, before anything expensive is computed.

    Parameters
    ----------
    out : str
        The value of ``--out``.
    suffixes : collection of str
        Endings of run files, ``schema.SUFFIXES``.
    source : str, optional
        A run that must not be overwritten.

    Raises
    ------
    ValueError
        For another ending, or for `source` itself.
    """
    if not out.endswith(tuple(suffixes)):
        raise ValueError(f"--out {out!r} is no run; expected a name that ends in {', '.join(suffixes)}")
    if source is not None and Path(out).resolve() == Path(source).resolve():
        raise ValueError(
            f"--out {out!r} is the run itself, whose trace it would replace; name another file, or leave --out out"
        )


def positive_integer(text: str) -> int:
    """A whole number from 1 on; for `type=` of an argument.

    Parameters
    ----------
    text : str
        What was typed.

    Returns
    -------
    int

    Raises
    ------
    ArgumentTypeError
        For anything else.
    """
    # int() also takes "1_000", " 7 " and digits of other scripts, which are typing errors here.
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one from 1 on")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive; give a whole number from 1 on")
    return int(text)


def comma_separated(text: str) -> list[str]:
    """Names with commas between them; for `type=` of an argument.

    Parameters
    ----------
    text : str
        What was typed.

    Returns
    -------
    list of str
        At least one name.

    Raises
    ------
    ArgumentTypeError
        Where no name is left: ``--metrics ""`` must not mean every metric.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(
            f"{text!r} names nothing; give one name or several with commas between, or leave the option out"
        )
    return names
