"""What a model shows of its residual streams: blocks, streams, layout, sites, and the proof of its connections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from diagnostics import schema
from probes.capture import batches, capture
from probes.inputs import Mask


@dataclass(frozen=True)
class ConnectionFacts:
    """One stream connection and its proof."""

    module: str
    layer: int
    branch: str
    reconstruction_error: float
    other_orientation_error: float
    read_error: float


@dataclass(frozen=True)
class Description:
    """What was found in a model; prints as a page."""

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

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        chains = ", ".join(f"{name or 'one chain'}: {depth} states" for name, depth in self.chains.items())
        sites = ", ".join(f"{count} {site}" for site, count in self.sites.items())
        lines = [
            f"{self.model}: {self.family}, {self.num_blocks} × {self.block or 'block'}, {self.dtype}",
            f"  streams      {self.n_streams} of width {self.width}, layout {self.layout}",
            f"  chain        {chains} ({sites})",
        ]
        if self.connections:
            worst = max(self.connections, key=lambda c: c.reconstruction_error)
            lines += [
                f"  connections  {len(self.connections)}, orientation {self.orientation}",
                f"  proof        H_res X + H_post ⊗ F(H_pre X) gives the next state within {self.reconstruction_error:.1e} "
                f"(tolerance {self.reconstruction_tolerance:.0e}; worst at {worst.module})",
            ]
        return "\n".join(lines)


def describe(
    model: nn.Module,
    batch: Any,
    *,
    layers: str | Iterable[str] | None = None,
    layout: str | None = None,
    streams: int | None = None,
    mask: Mask = None,
) -> Description:
    """Say what was found in a model: family, blocks, streams, layout, sites, orientation and its proof.

    Parameters
    ----------
    model : Module
        The model.
    batch : object
        One batch, as in `probes.capture`.
    layers, layout, streams, mask
        Overrides, as in `probes.capture`.

    Returns
    -------
    Description

    Raises
    ------
    ChainError, LayoutError, ReconstructionError
        As in `probes.capture`.
    """
    first = next(iter(batches(batch)))
    run = capture(model, first, layers=layers, layout=layout, streams=streams, mask=mask, max_sequences=2)
    names = schema.chains(run)
    traces = {name: schema.chain_dataset(run, "trace", name) for name in names}
    leading = traces[names[0]]
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
        connections=tuple(_connections(leading)),
    )


def _connections(trace: Any) -> Iterable[ConnectionFacts]:
    for number in range(trace.sizes.get("connection", 0)):
        at = trace.isel(connection=number)
        yield ConnectionFacts(
            module=str(at["connection_module"].item()),
            layer=int(at["connection_layer"]),
            branch=str(at["branch"].item()),
            reconstruction_error=float(at["reconstruction_error"]),
            other_orientation_error=float(at["other_orientation_error"]),
            read_error=float(at["read_error"]),
        )
