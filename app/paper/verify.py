"""Does a bundle still follow from its runs? It is made again in a scratch folder, and compared number by number."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from depthscope.app.figures import Selection
from depthscope.app.paper.export import make_bundle, write_files
from depthscope.app.paper.replaced_folder import MANIFEST, foreign_files, is_own_file, manifest_of, sha256
from depthscope.app.readings.readings import Reading
from depthscope.app.text.venues import VENUES
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema import LIVE

NEARLY = 1e-9
"""Relative difference of two numbers that is rounding of another processor or library."""
MOST_LISTED = 5
"""Changed numbers of one file that are listed; all are counted."""


@dataclass(frozen=True)
class Verification:
    """What still follows from the runs, and what does not.

    ``same``: files that are the same, byte for byte.
    ``redrawn``: drawings with other bytes, whose numbers are the same: another version of a library or other fonts
    draw them.
    ``changed``: files whose numbers or words do not follow, with what was written and what follows now.
    ``edited``: files that differ from what the manifest lists.
    ``missing, new``: files that follow and are not there; files in the manifest that do not follow any more.
    ``runs``: runs that are not those of the manifest, with what differs.
    ``facts``: statements of the manifest that do not follow, such as a caption.
    ``notes``: what differs and decides nothing: versions, fonts, the commit, and files of others.
    """

    same: tuple[str, ...]
    redrawn: tuple[str, ...]
    changed: Mapping[str, str]
    edited: tuple[str, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    runs: Mapping[str, str]
    facts: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def follows(self) -> bool:
        """Whether everything in the bundle follows from the runs."""
        return not (self.changed or self.edited or self.missing or self.new or self.runs or self.facts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"follows": self.follows, **asdict(self), "same": len(self.same)}

    def in_words(self) -> str:
        """What a person reads."""
        lines = [f"{run}: {words}" for run, words in self.runs.items()]
        lines += [f"{MANIFEST}: {name}: {words}" for name, words in self.facts.items()]
        lines += [f"{name}: {words}" for name, words in self.changed.items()]
        lines += [f"{name}: edited after it was written" for name in self.edited if name not in self.changed]
        lines += [f"{name}: follows from the runs and is not there" for name in self.missing]
        lines += [f"{name}: does not follow from the runs any more" for name in self.new]
        if self.redrawn:
            lines.append(f"{len(self.redrawn)} drawings have other bytes and the same numbers")
        lines += self.notes
        total = len(self.same) + len(self.redrawn)
        verdict = "everything follows" if self.follows else "not everything follows"
        return "\n".join([*lines, f"{total} files follow from the runs: {verdict}"])


def verify_bundle(folder: Path, runs: Sequence[Reading] | Mapping[str, Any]) -> Verification:
    """Make a bundle again from its runs, with the settings of its manifest, and compare.

    ``runs``: the runs that it is said to be of; those that it does not name are left out, and a note names them.
    Raises InputError: For a folder that is no bundle, or a manifest whose settings are not known.
    """
    manifest = manifest_of(folder)
    settings = _settings(manifest)
    runs, others_given = _named_runs(manifest, runs)
    with TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        write_files(make_bundle(runs, **settings), fresh)
        made = json.loads((fresh / MANIFEST).read_text(encoding="utf-8"))
        written, now = manifest["files"], made["files"]
        names = sorted(set(written) & set(now))
        edited = tuple(
            name for name in written if is_own_file(folder, name) and sha256(folder / name) != written[name]
        )
        there = [name for name in names if is_own_file(folder, name)]
        others = {name: now[name] for name in there if sha256(folder / name) != now[name]}
        changed = {name: _difference(folder / name, fresh / name) for name in others if not _is_drawing(name)}
        changed = {name: words for name, words in changed.items() if words}
        redrawn = [name for name in others if _is_drawing(name) and name not in edited]
        changed |= {name: "its numbers are others" for name in redrawn if _has_other_numbers(name, changed)}
        if not list(_other_software(manifest, made)) and not made["commit"].endswith("-dirty"):
            # The same code and libraries draw the same numbers in the same bytes.
            same = (name for name in redrawn if name not in changed and not _has_other_numbers(name, others))
            changed |= dict.fromkeys(same, "has other bytes than the same versions draw")
        return Verification(
            same=tuple(name for name in there if name not in others),
            redrawn=tuple(name for name in redrawn if name not in changed),
            changed=changed,
            edited=edited,
            missing=tuple(name for name in now if not is_own_file(folder, name)),
            new=tuple(name for name in written if name not in now),
            runs=dict(_runs(manifest["runs"], made["runs"])),
            facts=dict(_facts(manifest, made)),
            notes=(*others_given, *_other_software(manifest, made), *_others(folder)),
        )


def _named_runs(
    manifest: Mapping[str, Any], runs: Sequence[Reading] | Mapping[str, Any]
) -> tuple[Sequence[Reading] | Mapping[str, Any], list[str]]:
    """The runs that a bundle names, in its order, and a note about the others."""
    named = list(manifest.get("runs") or ())
    if isinstance(runs, Mapping):
        # A run of several chains is a reading of each, named after it.
        given = (name for one in named for name in runs if one == name or one.startswith(f"{name}/"))
        chosen: Any = {name: runs[name] for name in given}
        others = [name for name in runs if name not in chosen]
    else:
        chosen = sorted((r for r in runs if r.name in named), key=lambda reading: named.index(reading.name))
        others = [reading.name for reading in runs if reading.name not in named]
    if not chosen:
        raise InputError(
            f"the bundle is of {', '.join(map(str, named)) or 'no run'}, and none of them was given; got "
            f"{', '.join(map(str, others)) or 'none'}"
        )
    return chosen, [f"given, and not of this bundle: {', '.join(map(str, others))}"] if others else []


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a bundle, refusing a manifest that was changed to others than there are."""
    try:
        venue, by, formats = VENUES[manifest["venue"]], str(manifest["by"]), list(manifest["formats"])
        choice = {name: value for name, value in manifest["selection"].items() if value is not None}
        if "depths" in choice:
            choice["depths"] = tuple(choice["depths"])
        view = Selection.of(choice)
        described = [manifest["runs"], manifest.get("software") or {}, *manifest["runs"].values()]
        if not all(isinstance(part, dict) for part in described) or not isinstance(
            manifest.get("fonts") or [], list
        ):
            raise InputError("runs, software or fonts")
        if not set(formats) <= {"pdf", "svg", "pgf", "png"}:
            raise InputError("formats")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the settings in {MANIFEST} cannot be repeated ({error}): it is of another version, or was edited; "
            "export the bundle again"
        ) from error
    return {"venue": venue, "view": view, "by": by, "formats": formats}


def _is_drawing(name: str) -> bool:
    # Parquet is not drawn, but its bytes are those of a library; its numbers are in the CSV of the same name.
    return name.endswith((".pdf", ".svg", ".pgf", ".png", ".parquet"))


def _has_other_numbers(name: str, changed: Mapping[str, str]) -> bool:
    """Whether the numbers of a drawing, which are in files of text, differ."""
    folder, _, file = name.partition("/")
    stem = Path(file).stem
    if folder == "figures":
        return any(each.startswith(f"data/{stem}_") for each in changed)
    return f"{folder}/{stem}.csv" in changed


def _difference(old: Path, new: Path) -> str:
    """What differs between two files of text, as a phrase; empty for rounding."""
    try:
        before, after = old.read_text(encoding="utf-8"), new.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "is not text any more"
    if old.suffix == ".csv":
        return _table_difference(before, after)
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    for place, (was, now) in enumerate(pairs, start=1):
        if was != now:
            return f"line {place} has {_short(was)!r}; {_short(now)!r} follows"
    return f"has {len(before.splitlines())} lines; {len(after.splitlines())} follow"


def _table_difference(before: str, after: str) -> str:
    old, new = (list(csv.reader(io.StringIO(text))) for text in (before, after))
    if [len(row) for row in old] != [len(row) for row in new]:
        return f"has {len(old)} rows of other lengths; {len(new)} rows follow"
    cells = list(_changed_cells(old, new))
    if not cells:
        return ""
    listed = "; ".join(
        f"row {row}, {_short(column)}: {_short(was)} was written, {_short(now)} follows"
        for row, column, was, now in cells[:MOST_LISTED]
    )
    more = f" and {len(cells) - MOST_LISTED} more" if len(cells) > MOST_LISTED else ""
    return f"{len(cells)} of {sum(map(len, new))} cells differ: {listed}{more}"


def _changed_cells(old: list[list[str]], new: list[list[str]]) -> Iterator[tuple[int, str, str, str]]:
    for row, (before, after) in enumerate(zip(old, new, strict=True)):
        for column, (was, now) in enumerate(zip(before, after, strict=True)):
            if was != now and not _nearly(was, now):
                yield row, new[0][column], was, now


def _nearly(was: str, now: str) -> bool:
    try:
        return math.isclose(float(was), float(now), rel_tol=NEARLY, abs_tol=1e-15)
    except ValueError:
        return False


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _runs(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in sorted(set(was) | set(now)):
        if name not in now:
            yield name, "is in the manifest and was not given"
        elif name not in was:
            yield name, "was given and is not in the manifest"
        elif was[name].get("numbers_sha256") != now[name]["numbers_sha256"]:
            yield name, "has other numbers than the run that the bundle was made of"
        elif _plain(_lasting(was[name].get("attributes"))) != _plain(_lasting(now[name]["attributes"])):
            yield name, "has other attributes than the run that the bundle was made of"


def _lasting(attributes: Any) -> Any:
    """Attributes of a run but for when its live store was looked at, and by whom it was written then."""
    is_mapping = isinstance(attributes, Mapping)
    return {k: v for k, v in attributes.items() if k != LIVE} if is_mapping else attributes


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _facts(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Statements of a manifest about its figures that do not follow."""
    for part in ("figures", "left_out", "supplement"):
        before, after = (each.get(part) for each in (was, now))
        if not isinstance(before, dict):
            yield part, "is missing"
            continue
        for name in sorted(set(before) | set(after or {})):
            if _plain(before.get(name)) != _plain((after or {}).get(name)):
                yield f"{part}/{name}", "is not what follows from the runs"


def _others(folder: Path) -> Iterator[str]:
    """Files that no export wrote, which say nothing about the runs."""
    found = [str(name) for name in foreign_files(folder, force=True)]
    if found:
        more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
        yield f"not written by an export, and not compared: {', '.join(found[:MOST_LISTED])}{more}"


def _other_software(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(set(was.get("software") or {}) | set(now["software"])):
        before, after = ((each.get("software") or {}).get(name, "none") for each in (was, now))
        if before != after:
            yield f"written with {name} {before}, recomputed with {after}"
    if was.get("fonts") != now["fonts"]:
        before, after = (
            ", ".join(map(str, each.get("fonts") or [])) or "matplotlib's fonts" for each in (was, now)
        )
        yield f"names drawn with {before}, recomputed with {after}"
    if was.get("commit") != now["commit"]:
        yield f"written at commit {was.get('commit') or 'unknown'}, recomputed at {now['commit'] or 'unknown'}"
