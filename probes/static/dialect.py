"""What is a dialect? One row of the table: how a family of checkpoints names its connections, and what they compute.

The rows are data, in ``dialects.toml`` and in the files of users; docs/how_to/checkpoints.md documents their keys.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from depthscope.probes.checkpoints.errors import CheckpointError, first_line, printable
from depthscope.probes.checkpoints.own_files import require_file
from depthscope.probes.static.formula import RANGES, Formula, FormulaError, Shape, Sizes, shape_of, solve

TABLE = Path(__file__).with_name("dialects.toml")
OWN_KEYS = (
    "name",
    "title",
    "like",
    "model_types",
    "branches",
    "absent",
    "note",
)  # which `like` does not copy
LARGEST_FILE = 1_000_000  # bytes; the table of public dialects has some 10 000
PARTS = ("pre", "post", "res")
ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WORD = re.compile(r"[A-Za-z0-9_.-]+")

KEYS: dict[str, type] = {
    **dict.fromkeys(
        ("name", "family", "style", "title", "like", "read", "write", "mixing", "query", "rows", "note"), str
    ),
    **dict.fromkeys(("model_types", "names", "branches", "absent"), list),
    **dict.fromkeys(("tensors", "optional", "constants", "parts", "gates"), dict),
    **dict.fromkeys(("head", "doubly_stochastic", "learns_mixing"), bool),
    "read_lag": int,
}
"""The keys of a row, with the types of their values."""
TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
    float: "a number",
}


@dataclass(frozen=True)
class Constant:
    """A number that a formula needs: the settings of a configuration that give it, and what is assumed without them."""

    keys: tuple[str, ...]
    default: float


@dataclass(frozen=True, eq=False)
class Dialect:
    """One row of the table; the fields are the keys that docs/how_to/checkpoints.md documents."""

    name: str
    family: str
    style: str
    title: str
    model_types: frozenset[str]  # empty: for all
    names: tuple[str, ...]
    branches: tuple[str, ...]
    leaves: Mapping[str, str]  # role by the tensor's own name
    required: frozenset[str]
    shapes: Mapping[str, Sequence[Shape]]
    shape_texts: Mapping[str, str]
    absent: frozenset[str]
    constants: Mapping[str, Constant]
    parts: Mapping[str, Formula]
    gates: Mapping[str, Formula]
    formulas: Mapping[str, Formula]  # read, write, mixing, query
    sources_in_rows: bool
    read_lag: int
    head: bool
    doubly_stochastic: bool
    learns_mixing: bool
    note: str
    users: bool = False
    _solved: dict[Any, list[Sizes]] = field(default_factory=dict, repr=False)

    @property
    def looked_for(self) -> str:
        """A description of the row, for a user whose checkpoint has no connection."""
        tensors = ", ".join(
            f"{role} ({text})" for role, text in self.shape_texts.items() if role in self.required
        )
        return f"{self.name}: {self.title}; {tensors}"

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Sizes]:
        """The streams, widths, … with which some tensors have the shapes of the row; see `formula.solve`."""
        # Layers of a model have equal shapes: they are solved once.
        key = tuple(sorted(shapes.items()))
        if key not in self._solved:
            self._solved[key] = solve(shapes, {role: self.shapes[role] for role in shapes})
        return self._solved[key]

    def read_roles(self) -> frozenset[str]:
        """The tensors whose values the formulas use."""
        formulas = (*self.parts.values(), *self.gates.values(), *self.formulas.values())
        return frozenset({name for formula in formulas for name in formula.names} & self.shapes.keys())

    def patterns(self) -> Iterator[re.Pattern[str]]:
        """Regular expressions of full tensor names, with the groups ``path``, ``branch`` and ``leaf``."""
        leaves = "|".join(map(re.escape, sorted({*self.leaves, *self.absent}, key=len, reverse=True)))
        branch = "|".join(map(re.escape, self.branches)) or r"[A-Za-z0-9_]+"
        for name in self.names:
            text = re.escape(name).replace(r"\{path\}\.", r"(?P<path>(?:.+\.)?)")
            text = text.replace(r"\{branch\}", f"(?P<branch>{branch})").replace(r"\*", f"(?P<leaf>{leaves})")
            yield re.compile(text)


@cache
def known_dialects() -> tuple[Dialect, ...]:
    """The rows of the table of public dialects."""
    return tuple(_rows(TABLE, {}, users=False))


def read_dialects(path: str | Path) -> tuple[Dialect, ...]:
    """Read a user's own rows from a file.

    ``path``: A TOML file with one ``[[dialect]]`` table each; see docs/how_to/checkpoints.md.
    Raises CheckpointError: If the file is missing or no TOML, or a row lacks a key, has an unknown one or a formula
    that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"no file of dialects at '{path}'; expected a TOML file with a [[dialect]] table"
        )
    require_file(path)
    return tuple(_rows(path, {row["name"]: row for row in _content(TABLE)}, users=True))


def _content(path: Path) -> list[Any]:
    if path.stat().st_size > LARGEST_FILE:
        raise CheckpointError(
            f"'{path}' has {path.stat().st_size} bytes; expected a TOML file of dialects, below 1 MB"
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' is not a TOML file ({first_line(error)}); correct that line"
        ) from error
    rows = content.get("dialect")
    if not isinstance(rows, list) or not rows or set(content) != {"dialect"}:
        raise CheckpointError(
            f"'{path}' has no [[dialect]] table, or others besides; see docs/how_to/checkpoints.md for an example"
        )
    return rows


def _rows(path: Path, others: Mapping[str, Any], *, users: bool) -> Iterator[Dialect]:
    """The rows of a file; those of ``others`` may be named by `like` too."""
    complete, seen = dict(others), set()
    for number, row in enumerate(_content(path), start=1):
        name = row.get("name", number) if isinstance(row, dict) else number
        try:
            _check_types(row)
            row = _with_copied_keys(row, complete)
            dialect = _dialect(row, users=users)
            if dialect.name in seen:
                raise FormulaError("its name is taken by an earlier row")
        except FormulaError as error:
            where = f"dialect {printable(str(name))!r} of '{path}'"
            raise CheckpointError(f"{where}: {error}; see docs/how_to/checkpoints.md") from error
        complete[dialect.name] = row
        seen.add(dialect.name)
        yield dialect


def _check_types(row: Any) -> None:
    if not isinstance(row, dict):
        raise FormulaError("it is not a table")
    for key, value in row.items():
        if key not in KEYS:
            raise FormulaError(f"{printable(key)!r} is not a key of a row; expected {', '.join(KEYS)}")
        # True is an int too
        if not isinstance(value, KEYS[key]) or (KEYS[key] is int and isinstance(value, bool)):
            raise FormulaError(f"{key} is {_type_name(value)}; expected {TYPE_NAMES[KEYS[key]]}")
        texts: Iterable[Any] = value.values() if isinstance(value, dict) and key != "constants" else ()
        for text in value if isinstance(value, list) else texts:
            if not isinstance(text, str):
                raise FormulaError(f"{key} contains {_type_name(text)}; expected text")
    if not WORD.fullmatch(row.get("name", "")):
        raise FormulaError("its name is missing, or has other signs than letters, digits, '-', '_' and '.'")


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def _with_copied_keys(row: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with what it does not give itself taken from the row that its `like` names, which is complete."""
    if "like" not in row:
        return row
    if row["like"] not in known:
        raise FormulaError(
            f"like = {printable(row['like'])!r} is not an earlier row; expected one of {', '.join(known)}"
        )
    base = _with_copied_keys(known[row["like"]], known)
    copied = {key: value for key, value in base.items() if key not in OWN_KEYS}
    return {**copied, **{key: value for key, value in row.items() if key != "like"}}


def _dialect(row: Mapping[str, Any], *, users: bool) -> Dialect:
    missing = [key for key in ("name", "family", "tensors", "names") if not row.get(key)]
    if missing:
        raise FormulaError(f"it has no {', '.join(missing)}")
    entries = {**row["tensors"], **row.get("optional", {})}
    texts = {_role(entry): text for entry, text in entries.items()}
    one = Dialect(
        name=row["name"],
        family=row["family"],
        style=row.get("style", row["name"]),
        title=row.get("title", row["family"]),
        model_types=frozenset(row.get("model_types", ())),
        names=tuple(row["names"]),
        branches=tuple(row.get("branches", ())),
        # A tensor may have several names, ``a|b`` in a row; the first of them is its role.
        leaves={leaf.strip(): _role(entry) for entry in entries for leaf in entry.split("|")},
        required=frozenset(map(_role, row["tensors"])),
        shapes={role: shape_of(text) for role, text in texts.items()},
        shape_texts=texts,
        absent=frozenset(row.get("absent", ())),
        constants={name: _constant(name, entry) for name, entry in row.get("constants", {}).items()},
        parts={name: Formula(text) for name, text in row.get("parts", {}).items()},
        gates={name: Formula(text) for name, text in row.get("gates", {}).items()},
        formulas={key: Formula(row[key]) for key in ("read", "write", "mixing", "query") if key in row},
        sources_in_rows=row.get("rows", "destinations") == "sources",
        read_lag=row.get("read_lag", 0),
        head=row.get("head", False),
        doubly_stochastic=row.get("doubly_stochastic", False),
        learns_mixing=row.get("learns_mixing", True),
        note=row.get("note", ""),
        users=users,
    )
    _check_names(one, row)
    return one


def _role(entry: str) -> str:
    """What formulas call a tensor: its first name, with ``_`` for every dot."""
    role = entry.split("|")[0].strip().replace(".", "_")
    if not ROLE.fullmatch(role):
        raise FormulaError(f"{printable(entry)!r} is not a name of a tensor")
    return role


def _constant(name: str, entry: Any) -> Constant:
    if not isinstance(entry, dict) or entry.keys() != {"keys", "default"}:
        raise FormulaError(
            f"constants.{printable(name)} is not a table with keys (of the configuration) and a default"
        )
    keys, default = entry["keys"], entry["default"]
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise FormulaError(f"constants.{printable(name)}.keys is not a list of names")
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        raise FormulaError(f"constants.{printable(name)}.default is not a number")
    if name in RANGES:
        raise FormulaError(f"constants.{name}: {name!r} is a size of the shapes; call the constant otherwise")
    return Constant(tuple(keys), float(default))


def _check_names(one: Dialect, row: Mapping[str, Any]) -> None:
    """Refuse a row whose names could never match, or whose orientation or lag is none."""
    for name in one.names:
        if name.count("*") != 1 or not name.startswith("{path}."):
            raise FormulaError(
                f"the name {printable(name)!r} must begin with '{{path}}.' and have one '*', where a tensor's own name is"
            )
    if row.get("rows", "destinations") not in ("sources", "destinations"):
        raise FormulaError(f"rows is {printable(row['rows'])!r}; expected 'sources' or 'destinations'")
    if one.read_lag not in (0, 1):
        raise FormulaError(f"read_lag is {one.read_lag}; expected 0 or 1")
    if "query" in one.formulas and "block" not in one.constants:
        raise FormulaError("query needs a constant 'block': how many layers are summed to one source")
    _check_formulas(one)


def _check_formulas(one: Dialect) -> None:
    """Refuse a row whose formulas use what it does not have."""
    if unknown := sorted(one.gates.keys() - set(PARTS)):
        raise FormulaError(f"gates.{unknown[0]} is not a part; expected {', '.join(PARTS)}")
    sizes = {
        name for shapes in one.shapes.values() for shape in shapes for size in shape for name in size.names
    }
    known = {"n"} | sizes | one.shapes.keys() | one.constants.keys()
    if clash := sorted(one.parts.keys() & known):
        raise FormulaError(
            f"parts.{clash[0]} is the name of a tensor, size or constant too; call it otherwise"
        )
    in_parts = (*one.parts.items(), *one.gates.items())
    allowed = known | one.parts.keys()
    for where, formula, names in (
        *((where, formula, known) for where, formula in in_parts),
        *((where, formula, allowed) for where, formula in one.formulas.items()),
    ):
        if missing := sorted(formula.names - names):
            raise FormulaError(
                f"{where} uses {missing[0]!r}, which is not a tensor, symbol of a shape, constant or part of the row; "
                f"known are {', '.join(sorted(names))}"
            )
