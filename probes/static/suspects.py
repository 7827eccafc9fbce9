"""Which tensors look like a connection and fit no row? They are named with their shapes, never passed over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from depthscope.probes.checkpoints.safetensors_header import StoredTensor
from depthscope.probes.static.candidates import WEIGHT, Candidate, Tensors, leaves_by_module
from depthscope.probes.static.facts import Unrecognised

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


def extra_tensors(
    found: Candidate, tensors: Tensors, modules: Mapping[str, list[tuple[str, str]]]
) -> list[StoredTensor]:
    """Tensors next to a connection's own that its row does not explain, and that may change what it computes."""
    module, _, start = found.prefix.rpartition(".")
    own = found.tensors
    dedicated = bool(start) or WORDS.search(module.rpartition(".")[2]) is not None
    return [
        tensors[name]
        for leaf, name in modules.get(module, ())
        if name not in own
        and leaf.startswith(start)
        and not HARMLESS.search(leaf)
        and (dedicated or WORDS.search(leaf) or MODIFIERS.search(leaf))
    ]


def unrecognised(
    tensors: Tensors, claimed: Iterable[Candidate], misfits: Iterable[Candidate], width: int | None
) -> Iterator[Unrecognised]:
    """The tensors that look like a connection's, by their names or shapes, and that no connection claims.

    Parameters
    ----------
    tensors : Mapping of str to StoredTensor
        All tensors of the checkpoint.
    claimed : iterable of Candidate
        What was recognised.
    misfits : iterable of Candidate
        Groups with the names of a row that lack a tensor or have other shapes.
    width : int or None
        Width of the model.

    Yields
    ------
    Unrecognised
        In the order of names.
    """
    modules = leaves_by_module(tensors)
    owned: set[str] = set()
    reasons: dict[str, str] = {}
    prefixes = []
    for one in claimed:
        owned |= one.tensors
        prefixes.append(one.prefix)
        reasons |= {
            extra.name: f"{one.dialect.name} has no such tensor"
            for extra in extra_tensors(one, tensors, modules)
        }
    for one in sorted(misfits, key=lambda one: len(one.roles)):
        reasons |= {
            name: f"as {one.dialect.name}, {one.misfit}"
            for name in one.tensors
            if _looks_alike(name, tensors, width)
        }
    inside = _Inside(prefixes)
    for name in sorted(tensors):
        if name in owned or (
            name not in reasons and not _looks_alike(inside.rest(name), tensors, width, name)
        ):
            continue
        tensor = tensors[name]
        yield Unrecognised(
            name, tensor.shape, tensor.dtype, reasons.get(name, "no row has these names and shapes")
        )


class _Inside:
    """What remains of a name behind the connection that it is in, so that words of the connection's own path do not count."""

    def __init__(self, prefixes: Iterable[str]):
        self.by_module: dict[str, str] = {prefix.rstrip("._"): prefix for prefix in prefixes}

    def rest(self, name: str) -> str:
        """The name without the path of a connection around it."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:end]) in self.by_module:
                return ".".join(parts[end:])
        return name


def _looks_alike(text: str, tensors: Tensors, width: int | None, name: str = "") -> bool:
    tensor = tensors[name or text]
    own = text.removesuffix(WEIGHT)
    if HARMLESS.search(own.rpartition(".")[2]) and not re.search(r"_res_norm|res_norm", own):
        return False
    return WORDS.search(own) is not None or _has_shape(tensor.shape, width)


def _has_shape(shape: tuple[int, ...], width: int | None) -> bool:
    """Whether a matrix projects n streams of the model's width to the weights of a connection."""
    if width is None or len(shape) != 2:
        return False
    for rows, inputs in (shape, shape[::-1]):
        n, rest = divmod(inputs, width)
        if rest == 0 and 1 < n <= MOST_STREAMS:
            counts = {n * (n + 2), n * (n + 1), 2 * n, 3 * n, n * n}
            if n <= 6:
                counts |= {n + math.factorial(n)}
            # n alone is left out: any layer with few outputs on a wide input has it
            if rows in counts:
                return True
    return False
