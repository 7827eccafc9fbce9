"""A description of a model's residual streams: blocks, streams, layout, sites, and the proof of its connections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Unpack

import xarray as xr
from torch import nn

from depthscope.diagnostics import schema
from depthscope.probes.one_shot import measure
from depthscope.probes.reading.read import printed_after
from depthscope.probes.run.build_run import build_run
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import Options, Scope, SiteOptions, takes_options


@dataclass(frozen=True)
class ConnectionFacts:
    """One connection and its proof.

    ``module, layer, branch``: where it is.
    ``reconstruction_error, other_orientation_error``: ‖X' − (H_res X + H_post ⊗ F)‖ / ‖X'‖ with H_res as reported,
    and with its transpose.
    ``read_error``: ‖F's input − H_pre X‖ / ‖F's input‖; NaN where no scalar H_pre exists.
    ``row_sum_error, column_sum_error``: max |Σ_j H_ij − 1| over destinations i, and max |Σ_i H_ij − 1| over sources
    j, over all tokens.
    """

    module: str
    layer: int
    branch: str
    reconstruction_error: float
    other_orientation_error: float
    read_error: float
    row_sum_error: float
    column_sum_error: float


# What a family is called in the first line, by the name that a run has.
FAMILIES = {
    "highway": "residual with gates on state and branch (highway)",
    "hc": "hyper-connections (hc)",
    "mhc": "hyper-connections with doubly stochastic mixing (mhc)",
    "streams": "hyper-connections at weights of an initialisation (streams)",
    "independent_hc": "hyper-connections whose streams are not mixed (independent_hc)",
    "gated": "streams read by gates of each feature (gated)",
    "depth_attention": "blocks attend to the outputs of earlier blocks (depth_attention)",
    "depth_history": "blocks read weighted sums of earlier outputs (depth_history)",
    "unknown": "streams as layout= and streams= say (unknown)",
    "unproven": "states that could not be proven (unproven)",
}
OVER_DEPTH = "each next state is recomputed from the embedding and the branches' outputs, weighted over depth"


@dataclass(frozen=True)
class Description:
    """What was found in a model; prints as a page.

    ``remarks`` has what is odd about its connections: dicts with ``kind`` (the verdict that reports it), ``sentence``,
    ``value``, ``connections`` (their numbers) and ``sure`` (False where it may be meant). ``proof`` is "proven", or
    "unproven: " and why; ``update`` says what each next state of one stream is; ``constraint`` is what the matrices satisfy,
    as measured; ``memory`` is what streams cost, by formula (`diagnostics.kernels.memory.StreamMemory`), empty for one.
    ``not_covered`` has what ran and lies in no chain: dicts with ``module``, ``blocks`` (their number), ``block`` (their
    class), ``share`` (of the parameters), ``why``, ``layers`` (the pattern that names them) and ``sentence``.
    """

    model: str
    family: str
    n_streams: int
    layout: str
    orientation: str
    block: str
    num_blocks: int
    dtype: str
    chains: dict[str, int]
    width: int
    sites: dict[str, int]
    reconstruction_error: float | None
    reconstruction_tolerance: float | None
    connections: tuple[ConnectionFacts, ...]
    changes_outside: tuple[dict[str, Any], ...]
    coverage: tuple[dict[str, Any], ...]
    remarks: tuple[dict[str, Any], ...] = ()
    proof: str = ""
    update: str = ""
    constraint: str = ""
    memory: dict[str, Any] = field(default_factory=dict)
    not_covered: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        chains = ", ".join(f"{name or 'one chain'}: {depth} states" for name, depth in self.chains.items())
        sites = ", ".join(f"{count} {site}" for site, count in self.sites.items())
        family = FAMILIES.get(self.family, self.family)
        lines = [
            f"{self.model}: {family}, {self.num_blocks} × {self.block or 'block'}, {self.dtype}",
            f"  streams      {self.n_streams} of width {self.width}, layout {self.layout}",
            f"  chain        {chains} ({sites})",
        ]
        if self.connections and self.reconstruction_error is not None:
            lines += self._proof()
        elif self.proof:
            proven = OVER_DEPTH if self.family in ("depth_attention", "depth_history") else self.update
            lines.append(f"  proof        {proven if self.proof == schema.PROVEN and proven else self.proof}")
        if self.constraint:
            lines.append(f"  constraint   {self.constraint}")
        if "sentence" in self.memory:
            lines.append(f"  memory       {self.memory['sentence']}")
        lines += [
            f"  outside      depth {change['depth_in']} → {change['depth_out']}: the streams change by {change['change']:.1%} "
            f"outside of the connections, before {change['module']}"
            for change in self.changes_outside
        ]
        lines += [f"  not covered  {part['sentence']}" for part in self.not_covered]
        lines += [f"  remark       {remark['sentence']}" for remark in self.remarks]
        return "\n".join(lines + self._coverage())

    def _proof(self) -> list[str]:
        worst = max(self.connections, key=lambda c: c.reconstruction_error)
        lines = [
            f"  connections  {len(self.connections)}, orientation {self.orientation}",
            f"  proof        H_res X + H_post ⊗ F(H_pre X) gives the next state within {self.reconstruction_error:.1e} "
            f"(tolerance {self.reconstruction_tolerance:.0e}; worst at {worst.module})",
        ]
        # NaN where no scalar H_pre exists, which is not an error of it.
        reads = [c.read_error for c in self.connections if not math.isnan(c.read_error)]
        lines.append(
            f"  H_pre        gives the branch's input within {max(reads):.1e}"
            if reads
            else "  H_pre        no scalar weights: read by gates per feature, or by several views"
        )
        if self.orientation != "not_applicable":
            rows = max(c.row_sum_error for c in self.connections)
            columns = max(c.column_sum_error for c in self.connections)
            lines.append(
                f"  sums         of H_res over the sources within {rows:.1e} of 1, over the destinations within {columns:.1e}"
            )
        return lines

    def _coverage(self) -> list[str]:
        """How many sites fired, and for those that were not expected the reason: one line a reason, not a site."""
        expected = [row for row in self.coverage if row["expected"]]
        fired = sum(row["fired"] >= row["expected"] for row in expected)
        lines = [f"  coverage     {fired} of {len(expected)} expected sites fired"]
        reasons: dict[str, list[str]] = {}
        for row in self.coverage:
            if row["why"] and not row["expected"]:
                reasons.setdefault(row["why"], []).append(str(row["site"]))
        lines += [
            f"               {', '.join(dict.fromkeys(sites))}: {why}" for why, sites in reasons.items()
        ]
        return lines


@takes_options(SiteOptions)
def describe(
    model: nn.Module, batch: Any, *, print_after: str | None = None, **options: Unpack[SiteOptions]
) -> Description:
    """Describe what is found in a model: family, blocks, streams, layout, sites, orientation and its proof.

    Parameters
    ----------
    model : Module
        The model.
    batch : object
        One batch, as in `probes.capture`.
    print_after : str, optional
        Also print what one pass of the reading found: ``"record"``, ``"memories"``, ``"branches"``, ``"cuts"`` (the
        states), ``"connections"`` or ``"proof"``. `%7 add[3, 6] (2, 5, 16)` is value 7 of the forward, a sum of the
        values 3 and 6, and its shape.
    **options
        Some options of `Options`.

    Returns
    -------
    Description

    Raises
    ------
    InputError
        Where there is no such pass.
    ChainError, LayoutError, ReconstructionError
        As in `probes.capture`.
    """
    # One batch is enough: which chains and connections a model has does not depend on the data.
    first = list(islice(batches(batch), 1))
    # A proof needs tokens, not sequences.
    scope = Scope(only_own=True, sums=False)
    with printed_after(print_after):
        measured = measure(model, first, Options(**options, max_sequences=2), scope=scope)
    run = build_run(measured.session, None, [], described=True)
    names = schema.chains(run)
    traces = {name: schema.chain_dataset(run, "trace", name) for name in names}
    leading = traces[names[0]]  # only the first chain may have stream connections
    assert leading is not None
    sites = [str(site) for site in leading["site"].values]
    return Description(
        **{
            name: run.attrs[name]
            for name in ("model", "family", "n_streams", "layout", "orientation", "block")
        },
        num_blocks=run.attrs["num_blocks"],
        dtype=run.attrs["dtype"],
        chains={name: trace.sizes["depth"] for name, trace in traces.items() if trace is not None},
        width=leading.sizes["feature"],
        sites={site: sites.count(site) for site in dict.fromkeys(sites)},
        reconstruction_error=run.attrs.get("reconstruction_error"),
        reconstruction_tolerance=run.attrs.get("reconstruction_tolerance"),
        connections=tuple(_connection_facts(leading)),
        changes_outside=tuple(run.attrs.get("changes_outside", ())),
        coverage=tuple(_coverage_rows(run)),
        remarks=tuple(run.attrs.get("remarks", ())),
        proof=run.attrs.get("proof", ""),
        update=run.attrs.get("update", ""),
        constraint=run.attrs.get("constraint", ""),
        memory=run.attrs.get("memory", {}),
        not_covered=tuple(run.attrs.get("not_covered", ())),
    )


def _connection_facts(trace: xr.Dataset) -> Iterator[ConnectionFacts]:
    """The connections with streams; those of plain blocks have no weights to prove."""
    if "h_res" not in trace:
        return
    h_res = trace["h_res"].where(trace["mask"])  # NaN on padding, which `max` skips below and `sum` must not
    columns: dict[str, Any] = {
        name: trace[of].values.tolist()
        for name, of in (("module", "connection_module"), ("layer", "connection_layer"), ("branch", "branch"))
    }
    for name in ("reconstruction_error", "other_orientation_error", "read_error"):
        columns[name] = trace[name].values.tolist()
    for name, summed in (("row_sum_error", "stream_in"), ("column_sum_error", "stream_out")):
        off = abs(h_res.sum(summed, skipna=False) - 1)
        columns[name] = off.max([dim for dim in off.dims if dim != "connection"]).values.tolist()
    for values in zip(*columns.values(), strict=True):
        yield ConnectionFacts(**dict(zip(columns, values, strict=True)))


def _coverage_rows(run: xr.DataTree) -> Iterator[dict[str, Any]]:
    # Plain values, row by row: a description is written as JSON.
    columns = {str(name): values.values.tolist() for name, values in run["coverage"].data_vars.items()}
    for number, name in enumerate(columns.pop("place_name")):
        yield {"name": name, **{column: values[number] for column, values in columns.items()}}
