"""Has this difference been tested before? Tests of some runs, cached next to the first of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.kept_readings import folders_of, stem_of
from depthscope.diagnostics.analysis.differences import Difference
from depthscope.diagnostics.atomic_writes import replaced_file

ARRAYS = ("value", "half_width", "p")


def keep_differences(
    versions: Mapping[Path, FileVersion], question: str, differences: Sequence[Difference]
) -> None:
    """Keep what was tested; where no folder can be written to, nothing is kept.

    ``versions``: the runs in the order in which they were compared, and the files that were read.
    ``question``: what was compared: another text is another test.
    """
    text = json.dumps([_document(each) for each in differences], default=str)
    for place in _places(versions, question):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replaced_file(place) as fresh:
                fresh.write_text(text, encoding="utf-8")
            return


def kept_differences(versions: Mapping[Path, FileVersion], question: str) -> list[Difference] | None:
    """What was tested of these very files.

    Returns: None where nothing is kept, or it cannot be read.
    """
    for place in _places(versions, question):
        # Damaged, or of somebody else: it is tested anew.
        with suppress(OSError, ValueError, KeyError, TypeError):
            return [
                Difference(
                    **{**document, **{name: xr.DataArray.from_dict(document[name]) for name in ARRAYS}}
                )
                for document in json.loads(place.read_text(encoding="utf-8"))
            ]
    return None


def _places(versions: Mapping[Path, FileVersion], question: str) -> list[Path]:
    # Under the name of the first run: removed with what is kept of it when its file changes.
    first = next(iter(versions))
    of_all = repr([*((str(path), version.digest) for path, version in versions.items()), question])
    digest = hashlib.sha256(of_all.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return [folder / f"{stem_of(first, versions[first])}.{digest}.json" for folder in folders_of(first)]


def _document(difference: Difference) -> dict[str, Any]:
    words = {name: getattr(difference, name) for name in ("metric", "first", "second", "how", "undecided")}
    return {**words, **{name: getattr(difference, name).to_dict() for name in ARRAYS}}
