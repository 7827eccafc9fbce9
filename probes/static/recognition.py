"""Which tensors of a checkpoint are connections, and where in the network? Those with the names and shapes of a dialect."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from depthscope.probes.checkpoints.errors import CheckpointError, printable
from depthscope.probes.static.candidates import Candidate, Names, Tensors, candidates
from depthscope.probes.static.dialect import Dialect
from depthscope.probes.static.facts import Unrecognised
from depthscope.probes.static.shapes import Sizes
from depthscope.probes.static.suspects import extra_tensors, unrecognised, width_of

# Settings that give the number of streams, by model type.
STREAM_SETTINGS = (
    "hc_mult", "hc_count", "altup_num_inputs", "mhc_num_stream", "num_residual_streams", "hyper_connection.count",
    "altup.num_inputs",
)  # fmt: skip

# Words of module paths, in the order in which a block runs its branches.
BRANCHES = (
    ("altup", re.compile(r"altup", re.IGNORECASE)),
    ("attn", re.compile(r"att|ssm|mamba|retention", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Found:
    """One connection of a checkpoint: its row, its tensors, and what its shapes leave open.

    ``candidate``: the tensors.
    ``sizes``: streams, widths, …; None where the shapes do not decide.
    ``read_lag``: how many sub-blocks later the read is applied; None where the names do not tell.
    ``withheld``: why no weights are given; empty where they are.
    ``notes``: what was assumed.
    ``rivals``: other rows that fit as well and compute something else.
    """

    candidate: Candidate
    sizes: Sizes | None
    read_lag: int | None
    withheld: str = ""
    notes: tuple[str, ...] = ()
    rivals: tuple[Dialect, ...] = ()

    @property
    def dialect(self) -> Dialect:
        """Its row."""
        return self.candidate.dialect

    @property
    def streams(self) -> int:
        """n; the largest number that the shapes allow where they do not decide, 1 for a row without streams."""
        options = (self.sizes,) if self.sizes else self.candidate.sizes
        return max(sizes.get("n", 1) for sizes in options)

    @property
    def fractions(self) -> int:
        """Parts of each stream's features; 0 where the shapes do not decide."""
        return self.sizes.get("f", 1) if self.sizes else 0

    @property
    def width(self) -> int | None:
        """Width of a stream; None where no tensor gives it."""
        sizes = self.sizes or {}
        return sizes["d"] * self.fractions if "d" in sizes else sizes.get("D")


@dataclass(frozen=True)
class Recognition:
    """The connections of a checkpoint in the order of depth, the heads, and the tensors that look like one and fit no row."""

    connections: tuple[Found, ...]
    heads: tuple[Found, ...]
    unrecognised: tuple[Unrecognised, ...]


@dataclass(frozen=True)
class Context:
    """What is known of a checkpoint besides its tensors: its configuration, and what a user said that it is."""

    config: Mapping[str, Any] = field(default_factory=dict)
    named: str = ""

    @property
    def model_types(self) -> frozenset[str]:
        """Of the configuration and of its parts (``text_config``)."""
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        return frozenset(str(part["model_type"]) for part in parts if part.get("model_type"))

    def allows(self, row: Dialect, model_types: frozenset[str]) -> bool:
        """Whether a row may be used: it is for every model, or for this type, or no type is known."""
        if row.users or row.model_types is None or not model_types:
            return True
        return bool(model_types & set(row.model_types))

    def contradicts(self, row: Dialect) -> str:
        """The setting that rules a row out; empty where none does."""
        for key, value in row.not_if.items():
            if setting(self.config, key) == value:
                return f"{key} = {value}"
        for key, value in row.only_if.items():
            if setting(self.config, key) != value:
                return f"{key} is not {value}"
        return ""


def recognise(tensors: Tensors, rows: Sequence[Dialect], context: Context) -> Recognition:
    """The connections among tensors.

    ``context``: the configuration, and what the user named.
    Returns: A head has the shapes of a small layer, so it counts only where connections have as many streams of the
    same width.
    Raises CheckpointError: If the names are those of a dialect and the model type is of none, or the dialect that was
    named fits nothing.
    """
    usable, barred = _usable(rows, context)
    names = Names(tensors)
    found = {row: list(candidates(row, names)) for row in (*usable, *barred)}
    fitting = [one for row in usable for one in found[row] if not one.misfit]
    # heads of deepseek-v4 tell it from its successor, which has none
    with_head = any(one.dialect.head for one in fitting)
    settled = _settled(fitting, tensors, context, with_head=with_head)
    claimed = {name for one in settled for name in one.candidate.tensors}
    barred_ones = [one for row in barred for one in found[row] if not one.misfit]
    _require_known_type(rows, barred_ones, claimed, context)
    connections = [_with_unknown_type(one, rows, context) for one in settled if not one.dialect.head]
    if context.named and not connections:
        raise CheckpointError(_nothing_fits(context.named, [one for row in usable for one in found[row]]))
    sizes = {(one.streams, one.width) for one in connections}
    heads = [head for one in settled if one.dialect.head for head in _with_streams(one, sizes)]
    kept = [one.candidate for one in (*connections, *heads)]
    misfits = [one for row in usable for one in found[row] if one.misfit and not one.dialect.by_shapes]
    return Recognition(
        tuple(
            sorted(
                (_explained(one, names) for one in connections),
                key=lambda one: _depth_order(one.candidate.module),
            )
        ),
        tuple(heads),
        tuple(unrecognised(names, kept, misfits, width_of(tensors, context.config))),
    )


def _usable(rows: Sequence[Dialect], context: Context) -> tuple[list[Dialect], list[Dialect]]:
    """The rows to try, and those that are for other model types than the checkpoint's."""
    possible = [row for row in rows if not context.contradicts(row)]
    types, named = context.model_types, context.named
    if named and any(row.name == named for row in rows):
        # heads stay: they go with any row
        return [row for row in possible if row.name == named or row.head], []
    if named:
        known = {each for row in rows for each in row.known_types}
        if named not in known:
            names = ", ".join(row.name for row in rows if not row.head)
            raise CheckpointError(
                f"{printable(named)!r} is neither a dialect nor a model type of one; expected one of {names}"
            )
        types = frozenset({named})
    usable = [row for row in possible if context.allows(row, types)]
    return usable, [row for row in possible if row not in usable]


def _require_known_type(
    rows: Sequence[Dialect], barred: Sequence[Candidate], claimed: set[str], context: Context
) -> None:
    """Refuse where only rows of other model types fit: another model may compute something else under the same names."""
    unclaimed = [one for one in barred if not one.dialect.head and not one.tensors & claimed]
    if not unclaimed:
        return
    types = context.model_types
    shown = ", ".join(printable(each) for each in sorted(types))
    own = [row.name for row in rows if types & row.known_types and not row.head]
    known = (
        f"belongs to the dialect {own[0]}, which has other names" if own else "is not known to any dialect"
    )
    first = unclaimed[0]
    fits = list(dict.fromkeys(one.dialect.name for one in unclaimed if one.tensors == first.tensors))
    raise CheckpointError(
        f"the model type {shown} {known}, and {first.module} has the names or shapes of {' and of '.join(fits)}, which may "
        f"mean something else there; give --as {fits[0]} if it computes the same, or a row of your own with --dialect FILE"
    )


def _with_unknown_type(one: Found, rows: Sequence[Dialect], context: Context) -> Found:
    """The connection, with a note where its code is recognised by names that it has under any model type."""
    types = context.model_types
    known = any(types & row.known_types for row in rows)
    if not types or known or context.named or one.dialect.users:
        return one
    shown = ", ".join(printable(each) for each in sorted(types))
    note = f"the model type {shown} is known to no dialect: read as {one.dialect.name} by the names of its tensors"
    return replace(one, notes=(*one.notes, note))


def _nothing_fits(named: str, tried: Sequence[Candidate]) -> str:
    near = next((one for one in tried if one.misfit and not one.dialect.head), None)
    why = f": at {near.module}, {near.misfit}" if near else ""
    return f"no tensors have the names of the dialect {printable(named)!r}{why}; leave --as out to see what is there"


# --- which row, where several fit


def _settled(
    fitting: Sequence[Candidate], tensors: Tensors, context: Context, *, with_head: bool
) -> list[Found]:
    """One row for each group of tensors; what they leave open is said."""
    sizes = _sizes_of_model(tensors, context)
    # A rare row shares its shapes with others: the sizes of the configuration rule it out.
    fitting = [
        one for one in fitting if not one.dialect.rare or any(_agrees(each, sizes) for each in one.sizes)
    ]
    order = sorted(fitting, key=lambda one: (not one.dialect.users, one.dialect.by_shapes, -len(one.tensors)))
    accepted: list[list[Candidate]] = []
    owner: dict[str, list[Candidate]] = {}
    for one in order:
        rivals = next((owner[name] for name in one.tensors if name in owner), None)
        if rivals is None:
            accepted.append([one])
            owner |= dict.fromkeys(one.tensors, accepted[-1])
        elif rivals[0].tensors == one.tensors and not _outranks(rivals[0].dialect, one.dialect):
            rivals.append(one)
    return [_decided(rivals, sizes, with_head=with_head) for rivals in accepted]


def _sizes_of_model(tensors: Tensors, context: Context) -> Sizes:
    """Streams (n) and width (D) as far as the configuration or the embedding gives them."""
    streams = next((value for key in STREAM_SETTINGS if (value := setting(context.config, key))), None)
    known = {"n": streams, "D": width_of(tensors, context.config)}
    return {name: int(size) for name, size in known.items() if isinstance(size, (int, float))}


def _agrees(sizes: Sizes, known: Sizes) -> bool:
    # a generalised connection's stream is a part of the width
    return all(sizes.get(name) == size for name, size in known.items() if not (name == "D" and "m" in sizes))


def _outranks(first: Dialect, other: Dialect) -> bool:
    """Whether a row is preferred to another that has the same tensors: a user's own, and names before shapes alone."""
    return (first.users and not other.users) or (not first.by_shapes and other.by_shapes)


def _decided(rivals: Sequence[Candidate], known: Sizes, *, with_head: bool) -> Found:
    notes: list[str] = []
    options = _possible([(one, sizes) for one in rivals for sizes in one.sizes], known)
    common = [pair for pair in options if not pair[0].dialect.rare]
    if common and len(common) < len(options):
        rare = next(one for one, _ in options if one.dialect.rare)
        options = common
        notes.append(
            f"the shapes also fit {rare.dialect.name} ({rare.dialect.title}), which --as {rare.dialect.name} reads"
        )
    kinds = {_computation(one.dialect, sizes) for one, sizes in options}
    first, sizes = options[0]
    note = (first.dialect.note,) if first.dialect.note else ()
    if len(kinds) > 1:
        agreed = sizes if all(each == sizes for _, each in options) else None
        others = dict.fromkeys(each.dialect for each, _ in options)
        rows = tuple(row for row in others if row is not first.dialect)
        return Found(first, agreed, first.dialect.read_lag, _not_decided(options), tuple(notes), rows)
    lags = {one.dialect.read_lag for one, _ in options}
    lag: int | None = first.dialect.read_lag
    if len(lags) > 1:
        lag = 0 if with_head else None
        first = next(one for one, _ in options if one.dialect.read_lag == 0)
    if lag is None:
        names = " and ".join(dict.fromkeys(one.dialect.name for one, _ in options))
        notes.append(
            f"the names are those of {names}: H_pre is what each sub-block computes; whether it or the next one applies it "
            "the file does not tell, but config.json or --as does"
        )
    return Found(first, sizes, lag, "", (*note, *notes))


def _possible(options: list[tuple[Candidate, Sizes]], known: Sizes) -> list[tuple[Candidate, Sizes]]:
    """Rows and sizes that agree with the streams and the width of the model; all of them where none does."""
    for name, size in known.items():
        agreeing = [pair for pair in options if name in pair[1] and _agrees(pair[1], {name: size})]
        options = agreeing or options
    return options


def _computation(row: Dialect, sizes: Sizes) -> tuple[Any, ...]:
    """What a row computes, apart from when its read is applied: equal for rows that only name it differently."""
    formulas = {**row.parts, **row.formulas, **{f"gate {name}": gate for name, gate in row.gates.items()}}
    roles = {role: str(index) for index, role in enumerate(sorted(row.read_roles()))}
    texts = tuple(sorted((name, _renamed(formula.text, roles)) for name, formula in formulas.items()))
    return texts, row.sources_in_rows, row.family, tuple(sorted(sizes.items())) if not row.head else ()


def _renamed(text: str, roles: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda match: roles.get(match[0], match[0]), text)


def _not_decided(options: Sequence[tuple[Candidate, Sizes]]) -> str:
    names = list(dict.fromkeys(one.dialect.name for one, _ in options))
    if len(names) == 1:
        shown = "; ".join(
            ", ".join(f"{key} = {size}" for key, size in sorted(sizes.items())) for _, sizes in options[:4]
        )
        return f"the shapes do not decide between {shown}: no weights are given"
    return (
        f"the names and shapes do not decide between {' and '.join(names)}, which compute different weights: none are given; "
        f"--as {names[0]} (or {', '.join(names[1:])}) does"
    )


def _with_streams(one: Found, sizes: set[tuple[int, int | None]]) -> Iterator[Found]:
    """A head with the sizes of the connections; nothing where it has others."""
    for each in one.candidate.sizes:
        if (each.get("n", 1), each.get("D")) in sizes:
            yield replace(one, sizes=each, withheld="")
            return


def _explained(one: Found, names: Names) -> Found:
    """The connection, without weights where a tensor next to its own may change what it computes."""
    extras = extra_tensors(one.candidate, names)
    if not extras or one.withheld:
        return one
    shown = ", ".join(f"{each.name} {each.shape}" for each in extras[:3])
    return replace(one, withheld=f"{one.dialect.name} does not explain {shown}: no weights are given")


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the configuration or of a part of it; None where there is none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part[key] for part in parts if key in part), None)


@dataclass(frozen=True)
class Place:
    """Where in the network a module is."""

    chain: str
    layer: int
    branch: str


def place_of(module: str, inside: Sequence[str] = ()) -> Place:
    """Chain, layer and branch of a connection, from the words of its path or of the tensors in its branch.

    Returns: Layer -1 where the path has no number.
    """
    parts = module.split(".")
    # the first number of a path counts the blocks; what follows it names the part of the block
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = parts if at is None else parts[at + 1 :]
    # The innermost name is the most specific one; what is inside the module counts last.
    texts = (*reversed(own), *inside)
    branch = next((branch for text in texts for branch, words in BRANCHES if words.search(text)), "block")
    return Place("", -1, branch) if at is None else Place(".".join(parts[:at]), int(parts[at]), branch)


def _depth_order(module: str) -> tuple[Any, ...]:
    """Sort key: chain, then every number of the path, then attention before feed-forward, as blocks run them."""
    ranks = {branch: rank for rank, (branch, _) in enumerate(BRANCHES)}
    place = place_of(module)
    # As numbers: sorted as text, block 10 would come before block 2.
    numbers = tuple(int(part) for part in module.split(".") if part.isdigit())
    return place.chain, numbers, ranks.get(place.branch, len(ranks)), module
