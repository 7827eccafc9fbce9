"""Which tensors of a checkpoint have the names and shapes of a dialect's row? The candidates for connections."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from depthscope.probes.checkpoints.safetensors_header import StoredTensor
from depthscope.probes.static.dialect import Dialect
from depthscope.probes.static.shapes import Sizes

Tensors = Mapping[str, StoredTensor]  # by full name
WEIGHT = ".weight"  # of a Linear; x.weight is called x in the rows
MOST_LEAVES = 24  # parameters of one module that are tried by shapes alone; connections have up to ten


@dataclass(frozen=True, eq=False)
class Candidate:
    """Tensors that have the names of one connection of a dialect.

    Parameters
    ----------
    dialect : Dialect
        The row.
    module : str
        Path of the connection.
    prefix : str
        What the full names of its tensors begin with.
    roles : Mapping of str to StoredTensor
        Its tensors, as formulas call them.
    unused : tuple of StoredTensor
        Tensors that belong to it and that its code never applies.
    sizes : tuple of dict
        Streams, widths, …: one where the shapes decide.
    misfit : str
        Why it is no connection of the row; empty where it is.
    """

    dialect: Dialect
    module: str
    prefix: str
    roles: Mapping[str, StoredTensor]
    unused: tuple[StoredTensor, ...] = ()
    sizes: tuple[Sizes, ...] = ()
    misfit: str = ""
    also: tuple[str, ...] = field(default=())  # names of other rows that fit as well

    @property
    def tensors(self) -> frozenset[str]:
        """Full names of what it claims."""
        return frozenset(tensor.name for tensor in (*self.roles.values(), *self.unused))


def candidates(dialect: Dialect, tensors: Tensors) -> Iterator[Candidate]:
    """The groups of tensors that have a row's names, those with other shapes or with missing tensors too.

    Parameters
    ----------
    dialect : Dialect
        The row.
    tensors : Mapping of str to StoredTensor
        All tensors of the checkpoint.

    Yields
    ------
    Candidate
    """
    if dialect.by_shapes:
        yield from _by_shapes(dialect, tensors)
        return
    taken: set[str] = set()
    for group in _by_names(dialect, tensors):
        found = _checked(group)
        # A name may be written in two ways of the row (hc_head_fn: in a module, or of the model): the first counts.
        if not found.misfit and taken & found.tensors:
            continue
        taken |= frozenset() if found.misfit else found.tensors
        yield found


def _by_names(dialect: Dialect, tensors: Tensors) -> Iterator[Candidate]:
    endings = (*dialect.leaves, *dialect.unused, *dialect.absent)
    # A row may call the weight of a Linear x: x, or x.weight.
    texts = [(name, text) for name in tensors for text in dict.fromkeys((name.removesuffix(WEIGHT), name))]
    near = [pair for pair in texts if pair[1].endswith(endings)]
    for pattern in dialect.patterns():
        groups: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stem in near:
            match = pattern.fullmatch(stem)
            if match:
                groups[stem[: match.start("leaf")]][match["leaf"]] = tensors[name]
        for prefix, leaves in groups.items():
            if dialect.absent & leaves.keys():
                continue
            roles = {
                dialect.leaves[leaf]: tensor for leaf, tensor in leaves.items() if leaf in dialect.leaves
            }
            unused = tuple(tensor for leaf, tensor in leaves.items() if leaf not in dialect.leaves)
            if roles:
                yield Candidate(dialect, prefix.rstrip("._"), prefix, roles, unused)


def _checked(group: Candidate) -> Candidate:
    """The candidate with its sizes, or with the reason for which it is no connection of the row."""
    row = group.dialect
    missing = sorted(row.required - group.roles.keys())
    if missing:
        return replace(group, misfit=f"it lacks {', '.join(missing)}")
    # An empty tensor has no shape to go by; reading it says so.
    sizes = row.sizes({role: tensor.shape for role, tensor in group.roles.items() if math.prod(tensor.shape)})
    if not sizes:
        expected = ", ".join(f"{role} ({row.shape_texts[role]})" for role in sorted(group.roles))
        return replace(group, misfit=f"its shapes are not {expected}")
    return replace(group, sizes=tuple(sizes))


def _by_shapes(dialect: Dialect, tensors: Tensors) -> Iterator[Candidate]:
    """Connections among the parameters of a module whose names have one stem: x_fn, x_base and x_scale, or fn, base, scale."""
    for (module, stem), leaves in _stems(tensors).items():
        if not len(dialect.shapes) <= len(leaves) <= MOST_LEAVES:
            continue
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


def _stems(tensors: Tensors) -> dict[tuple[str, str], list[StoredTensor]]:
    found: dict[tuple[str, str], list[StoredTensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        module, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
        if len(tensor.shape) <= 2:
            found[module, leaf.rpartition("_")[0]].append(tensor)
    return found


def leaves_by_module(tensors: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """The tensors directly in each module, as pairs of own name and full name."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in tensors:
        module, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
        found[module].append((leaf, name))
    return found
