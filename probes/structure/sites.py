"""Which sites are captured: the names that people know, and what each means in a chain.

Known names: the sites ``embed``, ``pre``, ``mid``, ``post`` and ``final``; ``branch_in`` and ``branch_out``; ``attention``,
what the queries attend to before a state (also ``blocks.{i}.attn.hook_pattern``); ``h_pre``,
``h_post`` and ``h_res`` (also ``H_res``, ``comb``, ``alpha``, ``beta``); TransformerLens' ``hook_embed``,
``blocks.{i}.hook_resid_pre|mid|post``, ``blocks.{i}.hook_attn_out|hook_mlp_out``,
``blocks.{i}.attn_hc.hook_in|hook_post|hook_comb|hook_out`` and ``ln_final.hook_normalized``; transformers' ``hidden_states``
and ``hidden_states[i]`` (the state before block i; the last one is before the final norm). A number, ``{i}`` or ``*`` stands
for the block, ``{0,4,8-11}`` for some of them; without ``blocks.`` a hook name means every block. ``*`` in the name of a hook
stands for any letters.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.probes.structure.chain import Chain, Connection

STATES = ("embed", "pre", "mid", "post")
ATTENTION = "attention"
VARIABLES = ("branch_in", "branch_out", "h_pre", "h_post", "h_res")
WORDS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*STATES, "final", ATTENTION, *VARIABLES)},
    "residual": STATES,
    "hidden_states": STATES,
    "H_pre": ("h_pre",),
    "H_post": ("h_post",),
    "H_res": ("h_res",),
    "comb": ("h_res",),  # in DeepSeek-V4's code
    "alpha": ("h_pre", "h_res"),  # HC's α has the reads and the mixing in one matrix (arXiv 2409.19606)
    "beta": ("h_post",),
    "hook_embed": ("embed",),
    "ln_final.hook_normalized": ("final",),
}
# What a hook of one block means, and of which branch.
HOOKS: dict[str, tuple[str, str | None]] = {
    "hook_resid_pre": ("resid_pre", None),
    "hook_resid_mid": ("mid", None),
    "hook_resid_post": ("post", None),
    "hook_attn_in": ("branch_in", "attn"),
    "hook_mlp_in": ("branch_in", "mlp"),
    "attn.hook_pattern": (ATTENTION, "attn"),
    "hook_attn_out": ("branch_out", "attn"),
    "hook_mlp_out": ("branch_out", "mlp"),
    **{
        f"{branch}_hc.{hook}": (kind, label)
        # DeepSeek-V4 calls its feed-forward connection ffn_hc, others mlp_hc.
        for branch, label in (("attn", "attn"), ("mlp", "mlp"), ("ffn", "mlp"))
        for hook, kind in (
            ("hook_in", "hc_in"),
            ("hook_pre", "h_pre"),
            ("hook_post", "h_post"),
            ("hook_comb", "h_res"),
            ("hook_out", "branch_in"),
        )
    },
}
BLOCK = re.compile(r"blocks\.([^.]+)\.(.+)")
EVERY_BLOCK = re.compile(r"\*|\{[a-z_]\w*\}", re.IGNORECASE)
SOME_BLOCKS = re.compile(r"(\d+)(?:-(\d+))?")
MOST_BLOCKS = 100_000
STATE_INDEX = re.compile(r"hidden_states(?:\[(\d+)\]|\.(\d+))")


class SiteError(InputError):
    """A site that is not known, or that the model does not have."""


@dataclass(frozen=True)
class Request:
    """One requested name: kinds of sites, of some blocks or of all (None), of one branch or of all."""

    name: str
    kinds: tuple[str, ...]
    blocks: frozenset[int] | None = None
    branch: str | None = None
    state: int | None = None

    def takes_state(self, chain: Chain, depth: int) -> bool:
        """Whether a state of a chain is requested."""
        point = chain.points[depth]
        if self.state is not None:
            return self.state == _block_boundary(chain, depth)
        if "resid_pre" in self.kinds:
            block = _block_boundary(chain, depth)
            if block is None or not self.takes_block(block):
                return False
            # The state before block i is the one after block i − 1; after the last block there is no block.
            return block < _num_blocks(chain)
        if "hc_in" in self.kinds:  # the state that a connection reads, whatever its site is called
            return any(c.depth_in == depth and self.takes_connection(c) for c in chain.connections)
        return point.site in self.kinds and self.takes_block(point.layer)

    def takes_block(self, block: int) -> bool:
        """Whether a block is among those that are requested."""
        return self.blocks is None or block in self.blocks

    def takes_variable(self, chain: Chain, name: str) -> bool:
        """Whether a variable of a chain's connections is requested."""
        return name in self.kinds and any(self.takes_connection(c) for c in chain.connections)

    def takes_connection(self, connection: Connection) -> bool:
        """Whether a connection's block and branch are requested; one that is neither attention nor MLP counts as both."""
        return self.takes_block(connection.layer) and (
            self.branch is None or connection.branch in (self.branch, "block")
        )

    def fits(self, chain: Chain) -> bool:
        """Whether a chain has any of the requested states or variables."""
        return (
            any(self.takes_state(chain, depth) for depth in range(len(chain.points)))
            or ("final" in self.kinds and chain.final is not None)
            or ATTENTION in self.kinds  # known later, see `require_attention`
            or any(self.takes_variable(chain, name) for name in VARIABLES if _has_variable(chain, name))
        )


def _num_blocks(chain: Chain) -> int:
    return 1 + max(point.layer for point in chain.points)


def _block_boundary(chain: Chain, depth: int) -> int | None:
    """Number of blocks before a state; None inside a block."""
    point = chain.points[depth]
    return 0 if depth == 0 else point.layer + 1 if point.site == "post" else None


@dataclass(frozen=True)
class SiteSelection:
    """What of the chains is wanted; without requests every state, and every weight of stream connections."""

    requests: tuple[Request, ...] = ()

    @property
    def inside_blocks(self) -> bool:
        """Whether the insides of plain blocks are wanted, which takes a search for their sums."""
        return any({"mid", "branch_in", "branch_out"} & set(request.kinds) for request in self.requests)

    def captured(self, chain: Chain) -> frozenset[int]:
        """The depths whose states must be captured: those that are wanted, and those that a connection's proof needs."""
        if chain.has_streams:
            return frozenset(range(len(chain.points)))
        wanted = self.stored(chain)
        if not (self.includes("branch_in") or self.includes("branch_out")):
            return wanted
        # branch_in is the state before the connection, and branch_out is proven by the states around it.
        return wanted.union(*((c.depth_in, c.depth_out) for c in chain.connections))

    def stored(self, chain: Chain) -> frozenset[int]:
        """The depths whose states are stored in the run: all where no request names one, since every analysis needs some."""
        depths = range(len(chain.points))
        named = (depth for request in self.requests for depth in depths if request.takes_state(chain, depth))
        return frozenset(named) or frozenset(depths)

    def stores_connection(self, connection: Connection) -> bool:
        """Whether a connection is stored in the run."""
        return not self.requests or any(
            request.takes_connection(connection)
            for request in self.requests
            if set(request.kinds) & set(VARIABLES)
        )

    def stores_variable(self, chain: Chain, name: str) -> bool:
        """Whether a variable of the connections is stored in the run."""
        if not self.requests:
            return chain.has_streams or chain.over_depth
        return any(request.takes_variable(chain, name) for request in self.requests)

    def stores_connections(self, chain: Chain) -> bool:
        """Whether any variable of the connections is stored in the run."""
        return any(self.stores_variable(chain, name) for name in VARIABLES if _has_variable(chain, name))

    def includes(self, kind: str) -> bool:
        """Whether a kind of site is wanted at all."""
        return not self.requests or any(kind in request.kinds for request in self.requests)

    def stores_attention(self, chain: Chain, depth: int) -> bool:
        """Whether the attention that leads to a state is stored in the run."""
        return not self.requests or any(
            ATTENTION in request.kinds and request.takes_block(chain.points[depth].layer)
            for request in self.requests
        )

    def require_attention(
        self, chains: Sequence[Chain], found: Iterable[tuple[int, int]], reasons: Iterable[str]
    ) -> None:
        """Refuse a request for attention that no forward shows."""
        layers = {chains[number].points[depth].layer for number, depth in found}
        names = [request.name for request in self.requests]
        for request in self.requests:
            blocks = layers if request.blocks is None else request.blocks & layers
            # A pattern stands for several requests of one name, as in `require`.
            if ATTENTION not in request.kinds or blocks or names.count(request.name) > 1:
                continue
            why = (
                "; ".join(reasons)
                or "no softmax over the tokens, and no fused attention, was seen between two states"
            )
            if layers:
                why = f"attention was seen in the blocks {', '.join(map(str, sorted(layers)))}"
            raise SiteError(f"the site {request.name!r} did not fire: {why}")

    def require(self, chains: Sequence[Chain]) -> None:
        """Refuse a request for what no chain has, with its name, the reason, and what the model has."""
        # A pattern stands for several requests of one name, some of which a model may lack.
        fitting = {request.name for request in self.requests if any(request.fits(chain) for chain in chains)}
        for request in self.requests:
            if request.name not in fitting:
                raise SiteError(f"the site {request.name!r} did not fire: {_why_missing(chains, request)}")


def _has_variable(chain: Chain, variable: str) -> bool:
    # The branches of plain blocks have inputs and outputs, but no weights.
    return bool(chain.connections) and (chain.has_streams or not variable.startswith("h_"))


def _why_missing(chains: Sequence[Chain], request: Request) -> str:
    # The narrowest reason first: a block that does not exist explains more than a kind that the model lacks.
    blocks = max(_num_blocks(chain) for chain in chains)
    if request.blocks is not None and min(request.blocks) >= blocks:
        return f"the model has the blocks 0 … {blocks - 1}"
    if request.state is not None:
        return f"the model has the hidden states 0 … {blocks}"
    if "final" in request.kinds:
        return chains[-1].without_final
    if {"h_pre", "h_post", "h_res", "hc_in"} & set(request.kinds):
        return "the model has no stream connections of that kind"
    if request.kinds == ("mid",) and any(chain.connections for chain in chains):
        return "its blocks add all their branches at once, so there is no state between them"
    if {"mid", "branch_in", "branch_out"} & set(request.kinds):
        return (
            "no block shows how it adds its branches to the state (a post-norm block, or one without modules inside, does "
            "not); capture embed and post"
        )
    sites = sorted({point.site for chain in chains for point in chain.points})
    return f"the model has the sites {', '.join(sites)}"


def select(names: str | Sequence[str] | None) -> SiteSelection:
    """The selection that some names of sites mean.

    ``names``: see the module docstring; None for the default.
    Raises SiteError: For a name that is not known, with the closest ones.

    Examples
    --------
    >>> select("blocks.3.hook_resid_mid").requests[0]
    Request(name='blocks.3.hook_resid_mid', kinds=('mid',), blocks=frozenset({3}), branch=None, state=None)
    >>> [sorted(request.blocks) for request in select("blocks.{0,4-6}.hook_*_out").requests]
    [[0, 4, 5, 6], [0, 4, 5, 6]]
    """
    if names is None:
        return SiteSelection()
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise SiteError(f"sites is {names!r}; expected one name or several, such as {', '.join(EXAMPLES)}")
    return SiteSelection(tuple(request for name in wanted for request in _parse_name(name.strip())))


EXAMPLES = ("'mid'", "'final'", "'h_res'", "'blocks.3.hook_resid_post'", "'hidden_states[2]'")


def _parse_name(name: str) -> list[Request]:
    if name in WORDS:
        return [Request(name, WORDS[name])]
    index = STATE_INDEX.fullmatch(name)
    if index:
        return [Request(name, ("state",), state=int(index[1] or index[2]))]
    block = BLOCK.fullmatch(name)
    hook = block[2] if block else name  # a bare hook name means that hook of every block
    hooks = fnmatch.filter(HOOKS, hook)
    if hooks:
        blocks = _blocks_named(name, block[1]) if block else None
        return [Request(name, (kind,), blocks, branch) for kind, branch in map(HOOKS.__getitem__, hooks)]
    advice = did_you_mean(hook, [*WORDS, *HOOKS], otherwise=f"known are such as {', '.join(EXAMPLES)}")
    raise SiteError(f"no site is called {name!r}; {advice}")


def _blocks_named(name: str, text: str) -> frozenset[int] | None:
    """The numbers that some text stands for; None for every block."""
    if EVERY_BLOCK.fullmatch(text):
        return None
    found: set[int] = set()
    for part in (text[1:-1] if text[:1] + text[-1:] == "{}" else text).split(","):
        numbers = SOME_BLOCKS.fullmatch(part.strip())
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, -1)
        if not first <= last < MOST_BLOCKS:
            raise SiteError(
                f"{text!r} in the site {name!r} is not a number of a block; expected such as 3, * or {{0,4,8-11}}"
            )
        found |= set(range(first, last + 1))
    return frozenset(found)
