"""Which tensors of a checkpoint have the names and shapes of a dialect's row? The candidates for connections."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.tensor_inventory import StoredTensor
from depthscope.probes.static.dialect import Dialect
from depthscope.probes.static.formula import FormulaError
from depthscope.probes.static.shapes import Sizes

Tensors = Mapping[str, StoredTensor]  # by full name
WEIGHT = ".weight"  # of a Linear; x.weight is called x in the rows
NUMBERS = re.compile(r"\d+")
MOST_LEAVES = 24  # parameters of one module that are tried by shapes alone; connections have up to ten


class Names:
    """The tensors of a checkpoint, by full name, in the groups in which a hundred thousand names are looked at quickly.

    ``tensors``: by full name.
    """

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    @cached_property
    def alike(self) -> list[list[str]]:
        """Names that differ in their numbers alone, as those of layers and experts do."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            groups[NUMBERS.sub("#", name)].append(name)
        return list(groups.values())

    @cached_property
    def leaves(self) -> dict[str, list[tuple[str, str]]]:
        """The tensors directly in each module, as pairs of own name and full name."""
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in self.tensors:
            module, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
            found[module].append((leaf, name))
        return found

    @cached_property
    def stems(self) -> dict[tuple[str, str], list[StoredTensor]]:
        """Vectors and matrices of each module by the stem of their own names: x_fn and x_base have the stem x."""
        found: dict[tuple[str, str], list[StoredTensor]] = defaultdict(list)
        for module, leaves in self.leaves.items():
            for leaf, name in leaves:
                if len(self.tensors[name].shape) <= 2:
                    found[module, leaf.rpartition("_")[0]].append(self.tensors[name])
        return {key: leaves for key, leaves in found.items() if 2 < len(leaves) <= MOST_LEAVES}


@dataclass(frozen=True, eq=False)
class Candidate:
    """Tensors that have the names of one connection of a dialect.

    ``dialect``: the row.
    ``module``: path of the connection.
    ``prefix``: what the full names of its tensors begin with.
    ``roles``: its tensors, as formulas call them.
    ``unused``: tensors that belong to it and that its code never applies.
    ``sizes``: streams, widths, …: one where the shapes decide.
    ``misfit``: why it is no connection of the row; empty where it is.
    """

    dialect: Dialect
    module: str
    prefix: str
    roles: Mapping[str, StoredTensor]
    unused: tuple[StoredTensor, ...] = ()
    sizes: tuple[Sizes, ...] = ()
    misfit: str = ""

    @property
    def tensors(self) -> frozenset[str]:
        """Full names of what it claims."""
        return frozenset(tensor.name for tensor in (*self.roles.values(), *self.unused))


def candidates(dialect: Dialect, names: Names) -> Iterator[Candidate]:
    """The groups of tensors that have a row's names, those with other shapes or with missing tensors too."""
    try:
        yield from _by_shapes(dialect, names) if dialect.by_shapes else _named(dialect, names)
    except FormulaError as error:
        raise CheckpointError(f"dialect {dialect.name!r}: {error}; see docs/how_to/checkpoints.md") from error


def _named(dialect: Dialect, names: Names) -> Iterator[Candidate]:
    taken: set[str] = set()
    for group in _by_names(dialect, names):
        found = _checked(group)
        # A name may be written in two ways of the row (hc_head_fn: in a module, or of the model): the first counts.
        if not found.misfit and taken & found.tensors:
            continue
        taken |= frozenset() if found.misfit else found.tensors
        yield found


def _by_names(dialect: Dialect, names: Names) -> Iterator[Candidate]:
    for pattern in dialect.patterns():
        groups: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name in _near(pattern, names.alike):
            for text in _texts(name):
                match = pattern.fullmatch(text)
                if match:
                    groups[text[: match.start("leaf")]][match["leaf"]] = names.tensors[name]
        for prefix, leaves in groups.items():
            if dialect.absent & leaves.keys():
                continue
            roles = {
                dialect.leaves[leaf]: tensor for leaf, tensor in leaves.items() if leaf in dialect.leaves
            }
            unused = tuple(tensor for leaf, tensor in leaves.items() if leaf not in dialect.leaves)
            if roles:
                yield Candidate(dialect, prefix.rstrip("._"), prefix, roles, unused)


def _texts(name: str) -> tuple[str, ...]:
    # A row may call the weight of a Linear x: x, or x.weight.
    return (name.removesuffix(WEIGHT), name) if name.endswith(WEIGHT) else (name,)


def _near(pattern: re.Pattern[str], alike: Sequence[Sequence[str]]) -> Iterator[str]:
    """The names that a pattern may match, given by the first of those that differ only in their numbers."""
    # A pattern with numbers of its own is compared with every name.
    numbers = NUMBERS.search(pattern.pattern.replace("0-9", "")) is not None
    for group in alike:
        if numbers or any(pattern.fullmatch(text) for text in _texts(group[0])):
            yield from group


def _checked(group: Candidate) -> Candidate:
    """The candidate with its sizes, or with the reason for which it is no connection of the row."""
    row = group.dialect
    missing = sorted(row.required - group.roles.keys())
    if missing:
        return replace(group, misfit=f"it lacks {', '.join(missing)}")
    # An empty tensor has no shape to go by; reading it shows that.
    sizes = row.sizes({role: tensor.shape for role, tensor in group.roles.items() if math.prod(tensor.shape)})
    if not sizes:
        expected = ", ".join(f"{role} ({row.shape_texts[role]})" for role in sorted(group.roles))
        return replace(group, misfit=f"its shapes are not {expected}")
    return replace(group, sizes=tuple(sizes))


def _by_shapes(dialect: Dialect, names: Names) -> Iterator[Candidate]:
    """Connections among the parameters of a module whose names have one stem: x_fn, x_base and x_scale, or fn, base, scale."""
    for (module, stem), leaves in names.stems.items():
        # hc_fn of a module is its own; hc_attn_fn belongs to what the stem names
        path = module if module and stem in ("", "hc") else f"{module}.{stem}".strip(".")
        prefix = f"{module}.{stem}_" if stem else f"{module}."
        options = [
            [leaf for leaf in leaves if any(len(shape) == len(leaf.shape or (1,)) for shape in alternatives)]
            for alternatives in dialect.shapes.values()
        ]
        for chosen in itertools.product(*options):
            if len({leaf.name for leaf in chosen}) < len(chosen):
                continue
            roles = dict(zip(dialect.shapes, chosen, strict=True))
            sizes = dialect.sizes({role: leaf.shape for role, leaf in roles.items()})
            if sizes:
                yield Candidate(dialect, path, prefix, roles, (), tuple(sizes))
