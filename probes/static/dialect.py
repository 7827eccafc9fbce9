"""What is a dialect? One row of the table: how a family of checkpoints names its connections, and what they compute.

The rows are in `depthscope.probes.static.dialects`; docs/how_to/checkpoints.md has an example of a user's own.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    (width of a stream), r (rank of a gate) and p (proposals). Functions take `Values`.

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
    sinkhorn : function, optional
        In place of `mixing`: the arguments of `dialects.sinkhorn` besides the part ``res``.
    constants : mapping of str to Constant
        Numbers for the functions.
    model_types : frozenset of str
        Types that the row is for; empty for all.
    branches, absent : tuple of str
        The words that ``{branch}`` may be, where not any; own names that must not be there.
    sources_in_rows : bool
        Whether the rows of ``res`` and `mixing` are sources; destinations otherwise.
    read_lag : int
        1 where each sub-block applies the read that the one before computed; the first one reads stream 0.
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
    sinkhorn: Computed | None = None
    constants: Mapping[str, Constant] = field(default_factory=dict)
    model_types: frozenset[str] = frozenset()
    branches: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    sources_in_rows: bool = False
    read_lag: int = 0
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

    @property
    def computation(self) -> tuple[Any, ...]:
        """What is computed, apart from when the read is applied: equal for rows that only name it differently."""
        functions = (self.parts, self.gates, self.read, self.write, self.mixing, self.sinkhorn)
        return (*functions, self.sources_in_rows, self.family)

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

# What a symbol may be; those that are not listed (D, r, …) are sizes of features without an upper limit.
RANGES = {"n": range(2, 65), "p": range(1, 65)}  # streams, proposals
FUNCTIONS = {"factorial": math.factorial}


class Size:
    """One size of a shape, such as ``n*(n+2)``."""

    def __init__(self, text: str):
        self.text = text.strip()
        self._code = compile(self.text, "<shape>", "eval")
        self.names = frozenset(self._code.co_names) - FUNCTIONS.keys()

    def value(self, known: Mapping[str, int]) -> int:
        """With the symbols as they are known."""
        return int(eval(self._code, {"__builtins__": {}, **FUNCTIONS}, dict(known)))


def solve(shapes: Mapping[str, tuple[int, ...]], texts: Mapping[str, str]) -> list[Sizes]:
    """Every assignment of the symbols with which all tensors have the shapes of a row; both by role."""
    found: list[Sizes] = []
    # One number may be stored as () or as (1,).
    choices = [
        [
            list(zip(map(Size, each), shape or (1,), strict=True))
            for each in (alternative.split(",") for alternative in texts[role].split("|"))
            if len(each) == len(shape or (1,))
        ]
        for role, shape in shapes.items()
    ]
    for alternatives in itertools.product(*choices):
        pairs = [pair for each in alternatives for pair in each]
        ranged = sorted({name for formula, _ in pairs for name in formula.names} & RANGES.keys())
        for values in itertools.product(*(RANGES[name] for name in ranged)):
            sizes = _completed(pairs, dict(zip(ranged, values, strict=True)))
            if sizes is not None and sizes not in found:
                found.append(sizes)
    return found


def _completed(pairs: Sequence[tuple[Size, int]], known: Sizes) -> Sizes | None:
    """All symbols, where some are known and all equations hold; None where they do not."""
    waiting = list(pairs)
    while waiting:
        # The equation with the fewest unknown symbols first.
        pair = min(waiting, key=lambda pair: len(pair[0].names - known.keys()))
        waiting.remove(pair)
        (formula, size), unknown = pair, [*pair[0].names - known.keys()]
        if len(unknown) > 1:
            raise InputError(
                f"the size {formula.text!r} has several unknown factors; give each a shape of its own"
            )
        if unknown:
            # Sizes of features are large, and their equations linear: two values give the line.
            at_zero, at_one = (formula.value({**known, unknown[0]: value}) for value in (0, 1))
            slope = at_one - at_zero
            if slope <= 0 or size <= at_zero or (size - at_zero) % slope:
                return None
            known[unknown[0]] = (size - at_zero) // slope
        elif formula.value(known) != size:
            return None
    return known
