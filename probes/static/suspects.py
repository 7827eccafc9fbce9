"""Which tensors look like a connection and fit no row? They are named with their shapes, never passed over."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from depthscope.probes.checkpoints.tensor_inventory import StoredTensor
from depthscope.probes.static.candidates import WEIGHT, Candidate, Names, Tensors
from depthscope.probes.static.facts import Unrecognised
from depthscope.probes.static.formula import MOST_PERMUTED

# Words that name a connection's parts in public code, as whole parts of a name
WORDS = re.compile(
    r"""hyper_?conn | altup | (static|dynamic)_(alpha|beta) | stream_?mix | attn_?res(idual)?s?([._]|$)
    | (^|[._])(m|d|g|s)?hc([._]|$) | (^|[._])(mhc|hc)_ | _hc([._]|$)
    | (^|[._])h_?(res|pre|post)([._]|$) | (^|[._])(read_in|write_out|read_out|write_in)([._]|$)
    | residual_(scale|mix|gate|weight|bias|alpha|beta|lambda)s? | (attention|attn|mlp|ffn)_res_(norm|proj)
    | resid_lambda | x0_lambda | skip_(weight|lambda|gate)s? | depth_(weight|attention|alpha|mix)s?
    | (attention|mlp|final)_input[.]query | dense_?former | (^|[._])(dwa|mudd|lime)[._]
    | sinkhorn | birkhoff | permutation_(logit|weight)s?""",
    re.IGNORECASE | re.VERBOSE,
)
# Parameters that change what a connection computes, under names that say nothing of it
MODIFIERS = re.compile(r"^(temperature|tau|gate|mix|magnitude|iters)$", re.IGNORECASE)
# Norms act on the input, which is left out here; scales of quantised tensors belong to the tensor that they are named after.
HARMLESS = re.compile(
    r"norm|gamma|(weight_)?scale_inv$|weight_scale(_2)?$|input_scale$|zero_point|_packed$|num_batches",
    re.IGNORECASE,
)
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|token_embd|word_embeddings|wte|embedding|embed)$")
MOST_STREAMS = 16


def width_of(tensors: Tensors, config: Mapping[str, object]) -> int | None:
    """The width of the model: of its configuration, or of its embedding; None where neither exists."""
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for key in ("hidden_size", "d_model", "n_embd", "embedding_length", "dim"):
            value = part.get(key)
            if isinstance(value, (int, float)) and value > 0:
                return int(value)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and EMBEDDING.search(name.removesuffix(WEIGHT)):
            return tensor.shape[1]
    return None


def extra_tensors(found: Candidate, names: Names) -> list[StoredTensor]:
    """Tensors next to a connection's own that its row does not explain, and that may change what it computes."""
    module, _, start = found.prefix.rpartition(".")
    own = found.tensors
    dedicated = bool(start) or WORDS.search(module.rpartition(".")[2]) is not None
    return [
        names.tensors[name]
        for leaf, name in names.leaves.get(module, ())
        if name not in own
        and leaf.startswith(start)
        and not HARMLESS.search(leaf)
        and (dedicated or WORDS.search(leaf) or MODIFIERS.search(leaf))
    ]


def unrecognised(
    names: Names, claimed: Sequence[Candidate], misfits: Iterable[Candidate], width: int | None
) -> Iterator[Unrecognised]:
    """The tensors that look like a connection's, by their names or shapes, and that no connection claims.

    ``misfits``: groups with the names of a row that lack a tensor or have other shapes.
    """
    owned = {name for one in claimed for name in one.tensors}
    modules = {one.prefix.rstrip("._") for one in claimed}
    reasons = {
        extra.name: f"{one.dialect.name} has no such tensor"
        for one in claimed
        for extra in extra_tensors(one, names)
    }
    suspects = {name for group in names.alike for name in _suspects(group, names.tensors, modules, width)}
    suspects.update(_projections(names))
    for one in sorted(misfits, key=lambda one: len(one.roles)):
        reasons |= {name: f"as {one.dialect.name}, {one.misfit}" for name in one.tensors & suspects}
    for name in sorted((suspects | reasons.keys()) - owned):
        tensor = names.tensors[name]
        yield Unrecognised(
            name, tensor.shape, tensor.dtype, reasons.get(name, "no row has these names and shapes")
        )


def _suspects(
    group: Sequence[str], tensors: Tensors, modules: AbstractSet[str], width: int | None
) -> Iterator[str]:
    """Those of a group of names that differ in their numbers alone, which look like a connection's."""
    words = WORDS.search(group[0]) is not None
    for name in group:
        if (words and _has_words(name, modules)) or (
            _has_shape(tensors[name].shape, width) and not HARMLESS.search(name)
        ):
            yield name


def _projections(names: Names) -> Iterator[str]:
    """Matrices of one module from n·D to n, n² or n (n + 2) numbers next to an n × n matrix, whatever they are called."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name, tensor in names.tensors.items():
        if len(tensor.shape) > 1 and not HARMLESS.search(name):
            module, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
            # Those of all layers may be in a list next to one bias for all of them.
            modules[module.rpartition(".")[0] if leaf.isdigit() else module].append(name)
    for members in modules.values():
        sides = {name: _matrix(names.tensors[name].shape) for name in members}
        for n in {few for few, many in sides.values() if few == many and 1 < few <= MOST_STREAMS}:
            found = [name for name, (few, many) in sides.items() if _projects(few, many, n)]
            # A layer with n outputs alone is next to n heads that are mixed, as in talking heads.
            if any(sides[name][0] > n for name in found):
                yield from (*found, *(name for name in members if sides[name] == (n, n)))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The smaller and the larger of the last two sizes, without axes of size one."""
    sizes = [size for size in shape if size != 1][-2:]
    return (min(sizes), max(sizes)) if len(sizes) == 2 else (0, 0)


def _projects(outputs: int, inputs: int, n: int) -> bool:
    return outputs in (n, n * n, n * (n + 2)) and inputs % n == 0 and inputs // n > n


def _has_words(name: str, modules: AbstractSet[str]) -> bool:
    """Whether a name tells of a connection; words of the path of a recognised one around it do not count."""
    own = name.removesuffix(WEIGHT)
    if HARMLESS.search(own.rpartition(".")[2]) and "res_norm" not in own:
        return False
    parts = own.split(".")
    around = (end for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in modules)
    return WORDS.search(".".join(parts[next(around, 0) :])) is not None


def _has_shape(shape: tuple[int, ...], width: int | None) -> bool:
    """Whether a matrix projects n streams of the model's width to the weights of a connection."""
    if width is None or len(shape) != 2:
        return False
    for rows, inputs in (shape, shape[::-1]):
        n, rest = divmod(inputs, width)
        # Layers of the model's own width, as feed-forwards and embeddings are, have other sides that are multiples of it.
        if rest == 0 and rows % width and 1 < n <= MOST_STREAMS:
            # n alone is left out, and small multiples of two: any layer with few outputs on a wide input has them
            counts = {n * (n + 2), n * (n + 1)}
            if n > 2:
                counts |= {2 * n, 3 * n, n * n}
            if 2 < n <= MOST_PERMUTED:
                counts.add(n + math.factorial(n))
            if rows in counts:
                return True
    return False
