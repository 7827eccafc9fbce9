"""Mutated addresses of the dashboard: query parameters that no page wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from random import Random

from depthscope.diagnostics import schema
from tests.fuzz.kinds import Kind, Mutator, Subject
from tests.fuzz.outcomes import EQUAL, Answer, of_call
from tests.models.synthetic_run import synthetic_run

RUNS = ("plain", "mhc", "folder/plain")
NAMES = (
    "run",
    "runs",
    "part",
    "stream",
    "depths",
    "a",
    "b",
    "metric",
    "step",
    "token",
    "sample",
    "head",
    "chain",
    "view",
    "page",
    "",
)
WHOLE = (*RUNS, "0", "1", "0,1", "1-2", "all", "depth", "residual_norm", "raw")
HOSTILE = (
    "",
    " ",
    "\x00",
    "-1",
    "1e309",
    "nan",
    "9" * 5000,
    "٣",
    "²",
    "../../etc/passwd",
    "..%2f..%2fetc",
    "/etc/passwd",
    "C:\\x",
    "file:///etc/passwd",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "${7*7}",
    "$x$",
    "[a](javascript:alert(1))",
    "\u202e",
    "\ufeff",
    "a" * 100_000,
    "0," * 50_000,
    "0-999999999999",
    "5-1",
    "-",
    ",",
    "[]",
    "{}",
    "null",
    "None",
    "True",
    "__class__",
    "plain\n",
    "PLAIN",
    "plain/..",
)


def prepare(folder: Path) -> None:
    """Two runs and a folder with a third."""
    size = {"layers": 2, "samples": 1, "tokens": 4, "features": 4}
    for name in RUNS:
        schema.save_run(
            synthetic_run("mhc" if name == "mhc" else "residual", **size), folder / "runs" / f"{name}.nc"
        )


def warm_up(material: Path) -> None:
    """Import the dashboard."""
    import streamlit.testing.v1

    from depthscope.app.dashboard import pages, server

    assert all((streamlit.testing.v1, pages, server))
    logging.disable(logging.CRITICAL)


def _value(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(WHOLE)
    if kind < 0.8:
        return rng.choice(HOSTILE)
    letters = list(rng.choice(WHOLE) * rng.randint(1, 3))
    for _ in range(rng.randint(1, 4)):
        letters.insert(
            rng.randrange(len(letters) + 1),
            chr(rng.choice((rng.randrange(1, 128), rng.randrange(160, 0x2FFF)))),
        )
    return "".join(letters)


def _one(rng: Random) -> dict[str, list[str]]:
    return {rng.choice(NAMES[:-1]): [_value(rng)]}


def _many(rng: Random) -> dict[str, list[str]]:
    return {name: [_value(rng)] for name in rng.sample(NAMES, rng.randint(2, len(NAMES)))}


def _repeated(rng: Random) -> dict[str, list[str]]:
    return {rng.choice(NAMES[:-1]): [_value(rng) for _ in range(rng.choice((2, 10, 1000)))]}


def _unknown(rng: Random) -> dict[str, list[str]]:
    return {_value(rng)[:1000]: [_value(rng)] for _ in range(rng.choice((1, 300)))}


def _mutating(make: Callable[[Random], dict[str, list[str]]]) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        return {"page": rng.randrange(100), "query": make(rng)}

    return mutate


def open_doors(subject: Subject, material: Path, rng: Random) -> list[Answer]:
    """The page that this address opens, run as Streamlit runs it."""
    return [of_call("page", lambda: _open(subject, material), refusals=())]


def _open(subject: Subject, material: Path) -> tuple[str, str]:
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    from depthscope.app.dashboard import server
    from depthscope.app.dashboard.pages import PAGES
    from depthscope.app.dashboard.state import run_library

    run_library.allow([material / "runs"])
    page = PAGES[subject["page"] % len(PAGES)]
    test = AppTest.from_file(
        str(Path(server.__file__).with_name("navigation") / "entrypoint.py"), default_timeout=60
    )
    for name, values in subject["query"].items():
        test.query_params[name] = values if len(values) > 1 else values[0]
    test._page_hash = calc_hash(page.url_path)
    test.run()
    if test.exception:
        raise RuntimeError(f"{page.url_path}: {test.exception[0].value}")
    return EQUAL, page.title


URLS = Kind(
    name="urls",
    mutators={
        f"query:{make.__name__.strip('_')}": _mutating(make) for make in (_one, _many, _repeated, _unknown)
    },
    prepare=prepare,
    warm_up=warm_up,
    doors=open_doors,
    command=lambda subject: f"open the page with {subject['query']}"[:500],
    mib=400,  # plotly and the figures of a page
)
