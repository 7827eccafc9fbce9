"""What is a dialect? One row of the table: how a family of checkpoints names its connections, and what they compute.

The rows are in `depthscope.probes.static.dialects`; docs/how_to/checkpoints.md has an example of a user's own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from depthscope.diagnostics.errors import InputError

PARTS = ("pre", "post", "res")
Sizes = dict[str, int]


class Values(SimpleNamespace):
    """What the functions of a row compute with: tensors, sizes and constants by name, and its parts once they are known."""

    def get(self, name: str) -> Any:
        """An optional tensor; None where a checkpoint lacks it."""
        return getattr(self, name, None)


Computed = Callable[[Values], Any]


@dataclass(frozen=True)
class Constant:
    """A number that a row computes with: the settings of a configuration that give it, and what is assumed without them."""

    keys: tuple[str, ...]
    default: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialect:
    """One row: the names and shapes of a connection's tensors, and its weights where the input adds nothing.

    X' = H_res X + H_post ⊗ F(H_pre · X) has the parts ``pre``, ``post`` and ``res``. Sizes in shapes are n (streams), D
    (width of a stream), and others, each a factor. Functions take `Values`.

    Parameters
    ----------
    name, family : str
        What a description calls the row, and its family.
    names : tuple of str
        Full names of tensors: ``{path}.`` is any path or none, ``{branch}`` a word, ``*`` the tensor's own name; the ending
        ``.weight`` may be left out.
    tensors, projections, optional : mapping of str to str
        Shapes by own name, such as ``"n*(n+2), n*D"`` or ``"n | 1, n"``; a dot in a name is ``_`` here. Tensors are read;
        projections act on the input and are not; optional ones may be missing.
    unread : tuple of str
        Of the optional ones, those that change nothing where the input adds nothing.
    stored : mapping of str to str
        Own names in the files, where they are others: ``{"base": "base|hc_base"}``.
    parts, gates : function, optional
        Of values, a dict by part: the learned parameters, and the factors of what depends on the input; None where a
        checkpoint lacks the tensor.
    read, write, mixing : function, optional
        H_pre (n,), H_post (n,) and H_res (n, n) of values and parts.
    constants : mapping of str to Constant
        Numbers for the functions.
    model_types : frozenset of str
        Types that the row is for; empty for all.
    branches, absent : tuple of str
        The words that ``{branch}`` may be, where not any; own names that must not be there.
    sources_in_rows : bool
        Whether the rows of ``res`` and `mixing` are sources; destinations otherwise.
    head, learns_mixing : bool
        Whether it only reads the streams at the end; whether H_res has parameters.
    note : str
        A remark that is printed.
    """

    name: str
    family: str
    names: tuple[str, ...]
    tensors: Mapping[str, str]
    projections: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    parts: Computed | None = None
    gates: Computed | None = None
    read: Computed | None = None
    write: Computed | None = None
    mixing: Computed | None = None
    constants: Mapping[str, Constant] = field(default_factory=dict)
    model_types: frozenset[str] = frozenset()
    branches: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    sources_in_rows: bool = False
    head: bool = False
    learns_mixing: bool = True
    note: str = ""
    _solved: dict[Any, list[Sizes]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.names:
            if name.count("*") != 1 or not name.startswith("{path}."):
                raise InputError(
                    f"dialect {self.name!r}: the name {name!r} must begin with '{{path}}.' and have one '*', where a tensor's "
                    "own name is"
                )

    @cached_property
    def shapes(self) -> dict[str, str]:
        """Of all tensors that a connection may have, by role."""
        return {**self.tensors, **self.projections, **self.optional}

    @cached_property
    def leaves(self) -> dict[str, str]:
        """Role by own name in a file."""
        return {leaf: role for role in self.shapes for leaf in self.stored.get(role, role).split("|")}

    @property
    def required(self) -> frozenset[str]:
        """Roles without which nothing is a connection of the row."""
        return frozenset((*self.tensors, *self.projections))

    def own_name(self, role: str) -> str:
        """The first name of a tensor in files."""
        return self.stored.get(role, role).split("|")[0]

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Sizes]:
        """Every assignment of n, D, … with which some tensors, by role, have the shapes of the row."""
        # Layers of a model have equal shapes: they are solved once.
        key = tuple(sorted(shapes.items()))
        if key not in self._solved:
            self._solved[key] = solve(shapes, {role: self.shapes[role] for role in shapes})
        return self._solved[key]

    def patterns(self) -> Iterator[re.Pattern[str]]:
        """Regular expressions of full tensor names, with the groups ``path``, ``branch`` and ``leaf``."""
        leaves = "|".join(map(re.escape, sorted({*self.leaves, *self.absent}, key=len, reverse=True)))
        branch = "|".join(map(re.escape, self.branches)) or r"[A-Za-z0-9_]+"
        for name in self.names:
            text = re.escape(name).replace(r"\{path\}\.", r"(?P<path>(?:.+\.)?)")
            text = text.replace(r"\{branch\}", f"(?P<branch>{branch})").replace(r"\*", f"(?P<leaf>{leaves})")
            yield re.compile(text)


# --- the sizes that shapes give

STREAMS = range(2, 65)  # what n may be; the other symbols are factors of a size, without an upper limit
SYMBOL = re.compile(r"[A-Za-z]\w*")


def solve(shapes: Mapping[str, tuple[int, ...]], texts: Mapping[str, str]) -> list[Sizes]:
    """Every assignment of the symbols with which all tensors have the shapes of a row; both by role."""
    # One number may be stored as () or as (1,).
    choices = [
        [
            list(zip(each, shape or (1,), strict=True))
            for each in (alternative.split(",") for alternative in texts[role].split("|"))
            if len(each) == len(shape or (1,))
        ]
        for role, shape in shapes.items()
    ]
    found: list[Sizes] = []
    for alternatives in itertools.product(*choices):
        equations = [pair for each in alternatives for pair in each]
        # Those with one symbol first: they give what the others multiply.
        equations.sort(key=lambda pair: len(set(SYMBOL.findall(pair[0]))))
        for n in STREAMS if any("n" in SYMBOL.findall(text) for text, _ in equations) else (None,):
            sizes = {} if n is None else {"n": n}
            if all(_holds(text, size, sizes) for text, size in equations) and sizes not in found:
                found.append(sizes)
    return found


def _holds(text: str, size: int, known: Sizes) -> bool:
    """Whether a formula has a value; a symbol in it that is not known yet gets the value with which it has."""
    unknown = {*SYMBOL.findall(text)} - {*known}
    if len(unknown) > 1:
        raise InputError(
            f"the size {text.strip()!r} has several unknown factors; give each a shape of its own"
        )
    for symbol in unknown:
        known[symbol] = size // max(1, _value(text, {**known, symbol: 1}))
    return _value(text, known) == size


def _value(text: str, known: Sizes) -> int:
    return int(eval(text.strip(), {"__builtins__": {}}, dict(known)))
