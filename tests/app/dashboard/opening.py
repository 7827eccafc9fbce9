"""One page of the dashboard, run without a browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from depthscope.app.dashboard import server
from depthscope.app.dashboard.state import run_library

ENTRY = Path(server.__file__).resolve().parent / "navigation" / "entrypoint.py"


def open_page(page: str, roots: Sequence[Path], **parameters: str | list[str]) -> AppTest:
    """Run a page on some files; the pages' own modules are the ones that the test sees."""
    run_library.allow(roots)
    test = AppTest.from_file(str(ENTRY), default_timeout=120)
    for name, value in parameters.items():
        test.query_params[name] = value
    # AppTest.switch_page takes files only; Streamlit knows a page that is a function by the hash of its URL path.
    test._page_hash = calc_hash(page)
    test.run()
    assert not test.exception, test.exception
    return test


def parts(test: AppTest, what: str) -> list[dict]:
    """What the components of a page were sent, of those that say that they are something."""
    sent = [json.loads(element.proto.json) for element in test.get("bidi_component")]
    return [data for data in sent if data.get("what") == what]


def depth_map(test: AppTest) -> dict:
    """The rows of the map of all runs, by the name of the run."""
    (found,) = parts(test, "map")
    return {row["name"]: row for row in found["rows"]}


def charts(test: AppTest) -> dict[str, dict]:
    """Charts of a page by the name of the figure."""
    sent = [json.loads(element.proto.json) for element in test.get("bidi_component")]
    # The small drawings of cards are no charts.
    return {data["name"]: data for data in sent if "figure" in data}


def numbers(values) -> np.ndarray:
    """An array of a drawing."""
    if isinstance(values, dict):
        found = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        return (
            found.reshape([int(size) for size in values["shape"].split(",")]) if "shape" in values else found
        )
    return np.asarray(values, dtype=float)


def words(test: AppTest) -> str:
    """All text of a page, without the backslashes that switch Markdown off."""
    kinds = ("markdown", "caption", "info", "code", "expander", "error", "warning")
    parts = [part for kind in kinds for part in getattr(test, kind)]
    shown = "\n".join(str(getattr(part, "value", getattr(part, "label", ""))) for part in parts)
    return shown.replace("\\", "")
