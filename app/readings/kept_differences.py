"""Has this difference been tested before? Tests of some runs, in the user's cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.kept_readings import keep_document, kept_document
from depthscope.diagnostics.analysis.differences import Difference

ARRAYS = ("value", "half_width", "p")


def keep_differences(
    versions: Mapping[Path, FileVersion], question: str, differences: Sequence[Difference]
) -> None:
    """Save what was tested; nothing where the cache cannot be written to.

    ``versions``: the runs in the order in which they were compared, and the files that were read.
    ``question``: what was compared: another text is another test.
    """
    keep_document(*_place(versions, question), [_document(each) for each in differences])


def kept_differences(versions: Mapping[Path, FileVersion], question: str) -> list[Difference] | None:
    """What was tested of these very files.

    Returns: None where nothing was saved, or it cannot be read.
    """
    return kept_document(
        *_place(versions, question),
        lambda documents: [
            Difference(**{**each, **{name: xr.DataArray.from_dict(each[name]) for name in ARRAYS}})
            for each in documents
        ],
    )


def _place(versions: Mapping[Path, FileVersion], question: str) -> tuple[Path, FileVersion, str]:
    """Under the name of the first run: removed with what was saved of it when its file changes."""
    first = next(iter(versions))
    of_all = repr([*((str(path), version.digest) for path, version in versions.items()), question])
    digest = hashlib.sha256(of_all.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return first, versions[first], f".{digest}.json"


def _document(difference: Difference) -> dict[str, Any]:
    words = {name: getattr(difference, name) for name in ("metric", "first", "second", "how", "undecided")}
    return {**words, **{name: getattr(difference, name).to_dict() for name in ARRAYS}}
