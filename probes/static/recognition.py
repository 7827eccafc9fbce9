"""Which tensors of a checkpoint are connections, and where in the network? Those with the names and shapes of a dialect."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthscope.probes.checkpoints.errors import CheckpointError, printable
from depthscope.probes.checkpoints.tensor_inventory import StoredTensor
from depthscope.probes.static.dialect import Dialect, Sizes

Tensors = Mapping[str, StoredTensor]  # by full name
WEIGHT = ".weight"  # of a Linear; x.weight is called x in the rows
NUMBERS = re.compile(r"\d+")

# Settings that give the number of streams, by model type.
STREAM_SETTINGS = ("hc_mult", "hc_count", "mhc_num_stream", "num_residual_streams", "hyper_connection.count")
# Words of module paths, in the order in which a block runs its branches.
BRANCHES = (
    ("attn", re.compile(r"att|ssm|mamba|retention", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert", re.IGNORECASE)),
)
# Words that name a connection's parts in public code, as whole parts of a name.
WORDS = re.compile(
    r"""hyper_?conn | altup | (static|dynamic)_(alpha|beta) | stream_?mix | attn_?res(idual)?s?([._]|$)
    | (^|[._])(m|d|g|s)?hc([._]|$) | (^|[._])(mhc|hc)_ | _hc([._]|$)
    | (^|[._])h_?(res|pre|post)([._]|$) | (^|[._])(read_in|write_out|read_out|write_in)([._]|$)
    | residual_(scale|mix|gate|weight|bias|alpha|beta|lambda)s? | (attention|attn|mlp|ffn)_res_(norm|proj)
    | resid_lambda | x0_lambda | skip_(weight|lambda|gate)s? | depth_(weight|attention|alpha|mix)s?
    | (attention|mlp|final)_input[.]query | dense_?former | (^|[._])(dwa|mudd|lime)[._]
    | (phi|proj|alpha|b|bias)_(pre|post|res)([._]|$) | sinkhorn | birkhoff | permutation_(logit|weight)s?""",
    re.IGNORECASE | re.VERBOSE,
)
# Parameters that change what a connection computes, under names that say nothing of it.
MODIFIERS = re.compile(r"^(temperature|tau|gate|mix|magnitude|iters)$", re.IGNORECASE)
# Norms act on the input, which is left out here; scales of quantised tensors belong to the tensor that they are named after.
HARMLESS = re.compile(
    r"norm|gamma|(weight_)?scale_inv$|weight_scale(_2)?$|input_scale$|zero_point|_packed$|num_batches",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Found:
    """One connection of a checkpoint: tensors that have the names and shapes of a dialect's row.

    ``prefix``: what the full names of its tensors begin with.
    ``roles``: its tensors, as formulas call them.
    ``sizes``: streams, widths, …
    ``withheld``: why no weights are given; empty where they are.
    ``notes``: what was assumed.
    ``misfit``: why it is no connection of the row; empty where it is.
    """

    dialect: Dialect
    module: str
    prefix: str
    roles: Mapping[str, StoredTensor]
    sizes: Sizes
    withheld: str = ""
    notes: tuple[str, ...] = ()
    misfit: str = ""

    @property
    def tensors(self) -> frozenset[str]:
        """Full names of its tensors."""
        return frozenset(tensor.name for tensor in self.roles.values())

    @property
    def read(self) -> dict[str, StoredTensor]:
        """The tensors whose values the row's functions use."""
        row = self.dialect
        known = (*row.tensors, *(role for role in row.optional if role not in row.unread))
        return {role: self.roles[role] for role in known if role in self.roles}

    @property
    def streams(self) -> int:
        """n; 1 for a row without streams."""
        return self.sizes.get("n", 1)


@dataclass(frozen=True)
class Unrecognised:
    """A tensor that looks like a connection's and that no row of the dialects explains."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class Recognition:
    """The connections of a checkpoint in the order of depth, the heads, and the tensors that look like one and fit no row."""

    connections: tuple[Found, ...]
    heads: tuple[Found, ...]
    unrecognised: tuple[Unrecognised, ...]


def recognise(
    tensors: Tensors, rows: Sequence[Dialect], config: Mapping[str, Any], own: Collection[Dialect] = ()
) -> Recognition:
    """The connections among tensors.

    ``own``: the rows among them that the user gave, which come first and are for every model type.
    ``config``: the configuration of the model; its ``model_type`` rules out the rows of other models.
    Returns: A head has the shapes of a small layer, so it counts only where connections have as many streams of the
    same width.
    Raises CheckpointError: If the names are those of a dialect that is for other model types.
    """
    types = model_types(config)
    alike: dict[str, list[str]] = defaultdict(list)  # by the name without numbers, as in all layers
    modules: dict[str, list[tuple[str, str]]] = defaultdict(list)  # own names with full names
    for name in tensors:
        alike[NUMBERS.sub("#", name)].append(name)
        module, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
        modules[module].append((leaf, name))
    found = [one for row in rows for one in _named(row, tensors, alike.values())]
    usable = {
        row for row in rows if row in own or not row.model_types or not types or row.model_types & types
    }
    settled: dict[str, Found] = {}  # by tensor: a user's own rows first, then those that explain most of them
    for one in sorted(found, key=lambda one: (one.dialect not in own, -len(one.roles))):
        if one.dialect in usable and not one.misfit and not one.tensors & settled.keys():
            settled |= dict.fromkeys(one.tensors, one)
    _require_known_type(types, [one for one in found if not one.misfit and not one.tensors & settled.keys()])
    reasons: dict[str, str] = {}
    connections, possible_heads = [], []
    for one in dict.fromkeys(settled.values()):
        if one.dialect.head:
            possible_heads.append(one)
            continue
        extras = [tensors[name] for name in _extra_names(one, modules)]
        reasons |= {extra.name: f"{one.dialect.name} has no such tensor" for extra in extras}
        connections.append(_explained(one, extras, frozenset() if one.dialect in own else types))
    sizes = {(one.streams, one.sizes.get("D")) for one in connections}
    heads = [one for one in possible_heads if (one.streams, one.sizes.get("D")) in sizes]
    owned = {name for one in (*connections, *heads) for name in one.tensors}
    suspects = set(_suspects(alike.values(), {one.module for one in (*connections, *heads)}))
    for one in sorted(found, key=lambda one: len(one.roles)):
        if one.misfit and one.dialect in usable:
            reasons |= {name: f"as {one.dialect.name}, {one.misfit}" for name in one.tensors & suspects}
    unrecognised = [
        Unrecognised(
            name,
            tensors[name].shape,
            tensors[name].dtype,
            reasons.get(name, "no row has these names and shapes"),
        )
        for name in sorted((suspects | reasons.keys()) - owned)
    ]
    in_order = sorted(connections, key=lambda one: _depth_order(one.module))
    return Recognition(tuple(in_order), tuple(heads), tuple(unrecognised))


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model type of the configuration and of its parts (``text_config``)."""
    return frozenset(str(part["model_type"]) for part in _parts(config) if part.get("model_type"))


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the configuration or of a part of it; None where there is none."""
    return next((part[key] for part in _parts(config) if key in part), None)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration, and those of the model's parts that it contains."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


# --- the tensors that have the names of a row


def _named(row: Dialect, tensors: Tensors, alike: Iterable[Sequence[str]]) -> Iterator[Found]:
    """The groups of tensors that have a row's names, those with other shapes or with missing tensors too."""
    for pattern in row.patterns():
        groups: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for group in alike:
            if not any(pattern.fullmatch(text) for text in _texts(group[0])):
                continue
            for name in group:
                match = next((match for text in _texts(name) if (match := pattern.fullmatch(text))), None)
                if match:
                    groups[match.string[: match.start("leaf")]][match["leaf"]] = tensors[name]
        for prefix, leaves in groups.items():
            if not set(row.absent) & leaves.keys():
                yield _checked(row, prefix, {row.leaves[leaf]: tensor for leaf, tensor in leaves.items()})


def _texts(name: str) -> tuple[str, ...]:
    # A row may call the weight of a Linear x: x, or x.weight.
    return (name.removesuffix(WEIGHT), name) if name.endswith(WEIGHT) else (name,)


def _checked(row: Dialect, prefix: str, roles: Mapping[str, StoredTensor]) -> Found:
    """The connection with its sizes, or with the reason for which it is none."""
    one = Found(row, prefix.rstrip("._"), prefix, roles, {})
    missing = sorted(row.required - roles.keys())
    if missing:
        return replace(one, misfit=f"it lacks {', '.join(map(row.own_name, missing))}")
    # An empty tensor has no shape to go by; reading it shows that.
    sizes = row.sizes({role: tensor.shape for role, tensor in roles.items() if math.prod(tensor.shape)})
    if not sizes:
        expected = ", ".join(f"{row.own_name(role)} ({row.shapes[role]})" for role in sorted(roles))
        return replace(one, misfit=f"its shapes are not {expected}")
    if len(sizes) > 1:
        shown = "; ".join(
            ", ".join(f"{key} = {size}" for key, size in sorted(each.items())) for each in sizes[:4]
        )
        return replace(one, misfit=f"its shapes do not decide between {shown}")
    return replace(one, sizes=sizes[0])


def _require_known_type(types: frozenset[str], barred: Sequence[Found]) -> None:
    """Refuse where only rows of other model types fit: another model may compute something else under the same names."""
    first = next(
        (one for one in barred if not one.dialect.head and not one.dialect.model_types & types), None
    )
    if first is None or not types or not first.dialect.model_types:
        return
    fits = " and of ".join(dict.fromkeys(one.dialect.name for one in barred if one.tensors == first.tensors))
    raise CheckpointError(
        f"{first.module} has the names of {fits}, and the model type {', '.join(map(printable, sorted(types)))} is none of "
        f"theirs: another model may mean something else by them. If it computes the same, say so by a row of your own: "
        f"describe_weights(path, dialects=[...]), see docs/how_to/checkpoints.md"
    )


def _explained(one: Found, extras: Sequence[StoredTensor], types: frozenset[str]) -> Found:
    """The connection; without weights where a tensor among its own may change what it computes."""
    row = one.dialect
    notes = [row.note] if row.note else []
    if types and not row.model_types:
        shown = ", ".join(map(printable, sorted(types)))
        notes.append(f"read as {row.name} by the names of its tensors, under the model type {shown}")
    one = replace(one, notes=tuple(notes))
    if not extras:
        return one
    shown = ", ".join(f"{each.name} {each.shape}" for each in extras[:3])
    return replace(one, withheld=f"{row.name} does not explain {shown}: no weights are given")


def _extra_names(one: Found, modules: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    """Tensors next to a connection's own that its row does not explain, and that may change what it computes."""
    module, _, start = one.prefix.rpartition(".")
    is_its_own = bool(start) or WORDS.search(module.rpartition(".")[2]) is not None
    for leaf, name in modules.get(module, ()):
        tells = is_its_own or WORDS.search(leaf) or MODIFIERS.search(leaf)
        if tells and leaf.startswith(start) and name not in one.tensors and not HARMLESS.search(leaf):
            yield name


# --- what looks like a connection and fits no row


def _suspects(alike: Iterable[Sequence[str]], recognised: set[str]) -> Iterator[str]:
    """The names that tell of a connection; words of the path of a recognised module around it do not count."""
    for group in alike:
        for name in group if WORDS.search(group[0]) else ():
            own = name.removesuffix(WEIGHT)
            parts = own.split(".")
            around = (end for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in recognised)
            is_harmless = HARMLESS.search(parts[-1]) and "res_norm" not in own
            if not is_harmless and WORDS.search(".".join(parts[next(around, 0) :])):
                yield name


# --- where in the network


@dataclass(frozen=True)
class Place:
    """Where in the network a module is."""

    chain: str
    layer: int
    branch: str


def place_of(module: str, *, is_head: bool = False) -> Place:
    """Chain, layer and branch of a connection, from the words of its path.

    Returns: Layer -1 where the path has no number.
    """
    parts = module.split(".")
    # The first number of a path counts the blocks; what follows it names the part of the block, the last name best.
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = reversed(parts if at is None else parts[at + 1 :])
    branch = next((branch for text in own for branch, words in BRANCHES if words.search(text)), "block")
    branch = "head" if is_head else branch
    return Place("", -1, branch) if at is None else Place(".".join(parts[:at]), int(parts[at]), branch)


def _depth_order(module: str) -> tuple[Any, ...]:
    """Sort key: chain, then every number of the path, then attention before feed-forward, as blocks run them."""
    ranks = {branch: rank for rank, (branch, _) in enumerate(BRANCHES)}
    place = place_of(module)
    # As numbers: sorted as text, block 10 would come before block 2.
    numbers = tuple(int(part) for part in module.split(".") if part.isdigit())
    return place.chain, numbers, ranks.get(place.branch, len(ranks)), module
