"""Which axis of a value is which? Axes are followed through the operations of a forward as products of atoms.

``view(B, T, n·D)`` of a (B, T, n, D) value merges two atoms into one axis; splitting that axis again gives the same atoms
back. An axis of size 1 has no atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

# What was done along an axis, which tells what the axis is. Bits of one number: a forward makes thousands of atoms, and a set
# in each of them would bring the next complete collection of garbage nearer.
CONTRACTED = 1  # by a linear map with weights: an axis of features
SLID = 2  # by a convolution: an axis of tokens, or a side of an image
NORMALISED = 4  # by a norm: an axis of features (or channels)
ATTENDED = 8  # by a fused attention: an axis of tokens
WEIGHED = 16  # by a softmax: tokens, where an attention is written out; streams and sources have one too
BATCHED = 32  # given as the first axis of the model's input


_births = count()


class Atom:
    """A part of an axis that no operation seen so far has split.

    Parameters
    ----------
    size : int
        Its number of positions.
    whole : bool
        Whether it is an axis as an opaque operation made it. A stream axis is not: it was stacked, expanded, split from
        a longer axis, or made by the matrix that mixes streams.
    """

    __slots__ = ("_parts", "_same", "born", "parent", "roles", "size", "whole")

    def __init__(self, size: int, *, whole: bool, parent: Atom | None = None):
        self.size = size
        self.whole = whole
        self.born = next(_births)
        self.parent = parent
        self.roles = 0
        self._parts: dict[int, tuple[Atom, Atom]] | None = None  # most are never split
        self._same: Atom | None = None  # the atom that it was found to be the same as

    def itself(self) -> Atom:
        """The atom that stands for all that were found to be the same."""
        atom = self
        while atom._same is not None:
            atom = atom._same
        return atom

    def unite(self, other: Atom) -> None:
        """Note that two atoms are one: what is added to a state has the axes of the state."""
        first, second = self.itself(), other.itself()
        if first is second or first.size != second.size:
            return
        # The older one is that of the state; what is added may have got its axis in another way.
        if second.born < first.born:
            first, second = second, first
        second._same = first
        first.roles |= second.roles
        # What was cut from an axis and padded to its length again may be found to be that axis: no part of itself then.
        if first.parent is None and not (second.parent is not None and second.parent.comes_from(first)):
            first.parent = second.parent
        if second._parts is None:
            return
        if first._parts is None:
            first._parts = {}
        for outer, parts in second._parts.items():
            own = first._parts.setdefault(outer, parts)
            for mine, others in zip(own, parts, strict=True):
                mine.unite(others)

    def comes_from(self, other: Atom) -> bool:
        """Whether it is another atom, or a part of it."""
        seen: set[int] = set()
        atom: Atom | None = self
        while atom is not None and id(atom.itself()) not in seen:
            atom = atom.itself()
            if atom is other.itself():
                return True
            seen.add(id(atom))
            atom = atom.parent
        return False

    def split(self, outer: int) -> tuple[Atom, Atom]:
        """Its two parts, of which the outer one has ``outer`` positions; always the same two atoms."""
        atom = self.itself()
        if atom._parts is None:
            atom._parts = {}
        parts = atom._parts.get(outer)
        if parts is None:
            inner = atom.size // outer
            # Of two parts the larger one is what the axis was made of: features, of which there are more than streams.
            parts = atom._parts[outer] = (
                Atom(outer, whole=atom.whole and outer > inner, parent=atom),
                Atom(inner, whole=atom.whole and inner > outer, parent=atom),
            )
        return parts

    def merged_with(self, inner: Atom) -> Atom | None:
        """The atom of which this one and the next are the two parts, or None."""
        first, second = self.itself(), inner.itself()
        for parent in (first.parent, second.parent):
            halves = None if parent is None else parent.itself()._parts
            parts = None if halves is None else halves.get(first.size)
            if parts is not None and parts[0].itself() is first and parts[1].itself() is second:
                return parent.itself() if parent is not None else None
        return None

    def note(self, role: int) -> None:
        """Note what was done along it, and so along what it was split from."""
        own = self.itself()
        own.roles |= role
        if own.parent is None:
            return
        seen: set[int] = {id(own)}
        atom: Atom | None = own.parent
        while atom is not None and id(atom.itself()) not in seen:
            atom = atom.itself()
            seen.add(id(atom))
            atom.roles |= role
            atom = atom.parent

    def has(self, role: int) -> bool:
        """Whether something was done along it, or along a part of it."""
        return bool(self.itself().roles & role)


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def new_axes(shape: Sequence[int]) -> Axes:
    """Axes of a value that an opaque operation made."""
    return tuple([() if size == 1 else (Atom(size, whole=True),) for size in shape])


def made_axis(size: int) -> Axis:
    """An axis that a transparent operation made, as by stacking."""
    return () if size == 1 else (Atom(size, whole=False),)


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of a view of another shape, in row-major order; None where an atom would be cut across."""
    atoms = [atom.itself() for axis in axes for atom in axis]
    position, found = 0, []
    for size in shape:
        group: list[Atom] = []
        left = size
        while left > 1:
            if position == len(atoms):
                return None
            atom = atoms[position]
            if left % atom.size == 0:
                position += 1
                left //= atom.size
            elif atom.size % left == 0:
                atom, atoms[position] = atom.split(left)
                left = 1
            else:
                return None
            # An atom that was split twice comes back in two steps.
            while group and (merged := group[-1].merged_with(atom)) is not None:
                group.pop()
                atom = merged
            group.append(atom)
        found.append(tuple(group))
    return tuple(found) if position == len(atoms) else None


def broadcast(first: Axes, second: Axes) -> Axes:
    """The axes of a pointwise operation of two values: of each axis the one that has more than one position."""
    if first is second:
        return first
    if len(first) < len(second):
        first, second = second, first
    lead = len(first) - len(second)
    if not second:
        return first
    # An axis of a constant has no atom of its own: None stands for it.
    known = [b if not a or (b and a[0] is None) else a for a, b in zip(first[lead:], second, strict=True)]
    return first[:lead] + tuple(known)


def united(first: Axes, second: Axes) -> Axes:
    """The axes of a sum: where both values have an axis, the two are the same one."""
    if first is second:
        return first
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if len(a) == len(b):
            for one, other in zip(a, b, strict=True):
                if one is not None and other is not None:
                    one.unite(other)
    return broadcast(first, second)


def same_axes(first: Axes, second: Axes) -> bool:
    """Whether two values have the same atoms in the same order."""
    if first is second:
        return True
    return len(first) == len(second) and all(
        len(a) == len(b) and all(x.itself() is y.itself() for x, y in zip(a, b, strict=True))
        for a, b in zip(first, second, strict=True)
    )


def stream_atom(axes: Axes, most: int) -> Atom | None:
    """The atom that may be one of streams: the only one that no opaque operation made, of at most so many positions."""
    atoms = [atom.itself() for axis in axes for atom in axis]
    # The steps of a recurrence are stacked as well: what a convolution or an attention runs along are tokens.
    made = [a for a in atoms if not (a.whole or a.has(SLID) or a.has(ATTENDED) or a.has(BATCHED))]
    return made[0] if len(made) == 1 and made[0].size <= most else None


def is_packed(axes: Axes) -> bool:
    """Whether an attention or a convolution runs along the axis that was taken for that of the sequences."""
    atoms = [atom.itself() for axis in axes for atom in axis]
    along = (ATTENDED, SLID, WEIGHED)
    return len(atoms) == 2 and any(a.has(BATCHED) and any(a.has(role) for role in along) for a in atoms)


def layout_of(axes: Axes, stream: Atom | None) -> str | None:
    """The layout of a state by what was done along its axes, as in `depthscope.probes.model.layout`.

    ``stream``: the atom of its streams, where it has some.
    Returns: None where that does not tell every axis.
    """
    atoms = [atom.itself() for axis in axes for atom in axis]
    rest = [atom for atom in atoms if atom is not stream]
    batch = [atom for atom in rest if atom.has(BATCHED)]
    features = [
        atom
        for atom in rest
        if atom not in batch
        and (atom.has(CONTRACTED) or atom.has(NORMALISED))
        and not (atom.has(SLID) or atom.has(ATTENDED))
    ]
    if len(batch) != 1 or len(features) != 1 or len(set(map(id, atoms))) != len(atoms):
        return None
    letters = {id(batch[0]): "B", id(features[0]): "D"}
    if stream is not None:
        letters[id(stream)] = "N"
    # Rows and columns of an image that were merged are tokens in one axis.
    named = [list(dict.fromkeys(letters.get(id(atom.itself()), "T") for atom in axis)) for axis in axes]
    if any(not axis for axis in named):  # an axis of size 1 may be any
        return None
    tokens = [axis for axis in named if "T" in axis]
    if len(tokens) == 2 and all(axis == ["T"] for axis in tokens):
        tokens[0][0], tokens[1][0] = "H", "W"
    elif len(tokens) > 1:
        return None
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in named)


def none_noted(axis: Axis, role: int) -> None:
    """Take back what was noted of every atom of an axis."""
    for atom in axis:
        atom.itself().roles &= ~role


def all_noted(axis: Axis, role: int) -> None:
    """Note what was done along every atom of an axis."""
    for atom in axis:
        atom.note(role)
