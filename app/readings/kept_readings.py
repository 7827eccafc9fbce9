"""Has this run been analysed before? Analyses of a version of a run and what its verdicts were, in the user's cache folder."""

# A run is analysed once and looked at many times. The cache is valid for the very files that were analysed (device, inode,
# size and dates) and for this code: of a copied folder, or after an update, everything is analysed anew.

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope import diagnostics
from depthscope.app.readings.depth_map import PlacedFinding, Summary, summary_of
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import Reading, judged
from depthscope.diagnostics import Finding, Severity
from depthscope.diagnostics.atomic_writes import cache_folder, own_folder, remove_below, replaced_file
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import results_beside

UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)
"""What reading something raises that is damaged, or of somebody else."""

NAME_LENGTH = 80
"""Letters of a run's name in the name of the cached file: file systems allow 255 bytes."""


def keep(path: Path, version: FileVersion, readings: Sequence[Reading]) -> None:
    """Save the readings of a run; nothing where the cache cannot be written to."""
    text = json.dumps([asdict(summary_of(reading)) for reading in readings], default=str)
    with suppress(OSError, ValueError):
        folder, stem = own_folder(readings_folder()), stem_of(path, version)
        with replaced_file(folder / f"{stem}.npz") as fresh:
            _write_readings(fresh, readings)
        # The summary last: where it is, the analysis is too.
        with replaced_file(folder / f"{stem}.json") as fresh:
            fresh.write_text(text, encoding="utf-8")
        for name in os.listdir(folder):
            if name.startswith(_prefix(path)) and not name.startswith(stem):
                remove_below(folder, name)


def kept_readings(path: Path, version: FileVersion) -> tuple[Reading, ...] | None:
    """The readings of a run that were saved of these very files; None where nothing was, or it cannot be read."""
    # It may be damaged: never a reason not to show the run.
    with suppress(*UNUSABLE):
        return tuple(_read_readings(own_folder(readings_folder()) / f"{stem_of(path, version)}.npz", path))
    return None


def kept_summaries(path: Path, version: FileVersion) -> list[Summary] | None:
    """What the map of all runs shows of a run, without opening its analysis; None as in `kept_readings`."""
    with suppress(*UNUSABLE):
        place = own_folder(readings_folder()) / f"{stem_of(path, version)}.json"
        return [_summary(each) for each in json.loads(place.read_text(encoding="utf-8"))]
    return None


# Not the format of runs: its hundred variables would take seconds to open, for numbers that can be made anew.
def _write_readings(place: Path, readings: Sequence[Reading]) -> None:
    arrays: dict[str, np.ndarray] = {}
    documents = []
    for number, reading in enumerate(readings):
        for name, variable in reading.analysis.variables.items():
            values = np.asarray(variable.values)
            arrays[f"{number}/{name}"] = (
                values if values.dtype.kind in "fiubc" else values.astype(object).astype(str)
            )
        documents.append(
            {
                "name": reading.name,
                "attrs": reading.attrs,
                "chain": reading.chain,
                "num_steps": reading.num_steps,
                "analysis": reading.analysis.to_dict(data=False),
            }
        )
    text = json.dumps(documents, default=_plain)
    with place.open("wb") as file:
        np.savez(file, allow_pickle=False, readings=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays as Python's, which JSON has."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _read_readings(place: Path, path: Path) -> Iterator[Reading]:
    with np.load(place, allow_pickle=False) as arrays:
        # What is written here is not compressed: such an array may be larger than the memory.
        if any(info.compress_type != zipfile.ZIP_STORED for info in arrays.zip.infolist()):
            raise InputError("compressed")
        documents = json.loads(arrays["readings"].tobytes())
        for number, document in enumerate(documents):
            described = document["analysis"]
            for part in ("coords", "data_vars"):
                for name, variable in described[part].items():
                    values = arrays[f"{number}/{name}"]
                    # Texts as objects, as every other run has them.
                    variable["data"] = values.astype(object) if values.dtype.kind == "U" else values
            yield judged(
                document["name"],
                document["attrs"],
                xr.Dataset.from_dict(described),
                chain=document["chain"],
                path=str(path),
                results=results_beside(
                    path, *(document["attrs"].get(of) for of in ("weights_digest", "data_digest"))
                ),
                num_steps=int(document["num_steps"]),
            )


def _summary(document: Mapping[str, Any]) -> Summary:
    lists = {name: tuple(map(_mark, document[name])) for name in ("marks", "others")}
    profiles = {name: tuple(values) for name, values in document["profiles"].items()}
    return Summary(**{**document, **lists, "depths": tuple(document["depths"]), "profiles": profiles})


def _mark(document: Mapping[str, Any]) -> PlacedFinding:
    finding = document["finding"]
    plain = {"severity": Severity(finding["severity"]), "profile": tuple(finding["profile"])}
    return PlacedFinding(**{**document, "finding": Finding(**{**finding, **plain})})


def readings_folder() -> Path:
    """Where analyses are cached: never next to a run, in a folder that others may have made."""
    return cache_folder() / "readings"


def stem_of(path: Path, version: FileVersion) -> str:
    """What the names of files begin with that are valid for a version of a run, and for this code."""
    digest = hashlib.sha256(f"{version.digest} {_code_version()}".encode()).hexdigest()
    return f"{_prefix(path)}{digest[:32]}"


def _prefix(path: Path) -> str:
    """What the names of all cached files of a run begin with."""
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return f"{path.name.encode('ascii', 'replace').decode()[:NAME_LENGTH]}.{place}.".replace("?", "_")


@cache
def _code_version() -> str:
    """Of the code that analyses and judges: another version may come to other numbers."""
    files = [Path(__file__).resolve(), *sorted(Path(diagnostics.__file__).resolve().parent.rglob("*.py"))]
    facts = [(str(file), entry.st_size, entry.st_mtime_ns) for file in files for entry in (file.stat(),)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
