r"""What does a widened residual stream cost? Elements read and written, and activations saved for the backward.

Counts for one token, after section 4.3 and table 2 of the mHC paper (Xie et al. 2025, arXiv 2512.24880): n streams of width
d, L sublayers. Elements have no size in bytes of their own: multiply by that of the states' type.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from depthscope.diagnostics.errors import InputError


def _read(d: int, n: int, *, fused: bool = False) -> int:
    """Elements that one sublayer's connection reads for a token: (5n + 1) d + n² + 2n, fused (3n + 1) d + n² + 2n.

    The coefficients are computed from the streams (n d), the branch's input from the streams and H_pre (n d + n), the
    written output from the branch's and H_post (d + n), the mixed streams from the streams and H_res (n d + n²), and
    their sum from both (2 n d). A kernel that applies H_post and H_res and adds reads n d + d for the last three in
    place of (3n + 1) d. Coefficients that are parameters, and not computed from the streams, save n d.
    """
    # A plain residual adds the branch's output to the state; there is no other operation to fuse with.
    return 2 * d if n == 1 else ((3 if fused else 5) * n + 1) * d + n**2 + 2 * n


def _written(d: int, n: int, *, fused: bool = False) -> int:
    """Elements that it writes: (3n + 1) d + n² + 2n; the last three operations n d each, a fused kernel n d in all."""
    return d if n == 1 else ((1 if fused else 3) * n + 1) * d + n**2 + 2 * n


def _recomputed_block(n: int, sublayers: int) -> int:
    """Sublayers of a block that is recomputed in the backward, for the smallest memory: about √(nL / (n + 2))."""
    optimum = math.sqrt(n * sublayers / (n + 2))
    choices = [min(max(round_(optimum), 1), sublayers) for round_ in (math.floor, math.ceil)]
    return min(choices, key=lambda block: _kept_recomputed(1, n, sublayers, block))


def _kept_recomputed(d: int, n: int, sublayers: int, block: int) -> int:
    """Elements of a token that are kept with recomputation: n d ⌈L / L_r⌉ + (n + 2) d L_r.

    The streams at the begin of each block of L_r sublayers, and while one block runs backward its streams with the input and
    the output of each branch.
    """
    return n * d * math.ceil(sublayers / block) + (n + 2) * d * block


@dataclass(frozen=True)
class StreamMemory:
    """What the streams of a network cost, by formula.

    Parameters
    ----------
    width, streams, sublayers : int
        d, n and L, at least 1.
    element_bytes : int
        Size of an element of a state.
    """

    width: int
    streams: int
    sublayers: int
    element_bytes: int

    def __post_init__(self) -> None:
        for size in (self.width, self.streams, self.sublayers):
            if size < 1:
                raise InputError(
                    f"got a size of {size}; expected a width, a number of streams, or of sublayers from 1"
                )

    def traffic_ratio(self, *, fused: bool = False) -> float:
        """Elements moved by a connection, in units of what a plain residual moves (3 d)."""
        moved = [
            _read(self.width, self.streams, fused=fused),
            _written(self.width, self.streams, fused=fused),
        ]
        return sum(moved) / (3 * self.width)

    def as_dict(self) -> dict[str, Any]:
        """All counts: elements of a token and sublayer that are moved, bytes of a token that are kept."""
        n, d = self.streams, self.width
        block = _recomputed_block(n, self.sublayers)
        return {
            **asdict(self),
            "elements_read": _read(d, n),
            "elements_written": _written(d, n),
            "fused_elements_read": _read(d, n, fused=True),
            "fused_elements_written": _written(d, n, fused=True),
            "traffic_ratio": self.traffic_ratio(),
            "fused_traffic_ratio": self.traffic_ratio(fused=True),
            "kept_bytes": n * d * self.sublayers * self.element_bytes,
            "recomputed_kept_bytes": _kept_recomputed(d, n, self.sublayers, block) * self.element_bytes,
            "recomputed_block": block,
        }

    def sentence(self) -> str:
        """One sentence for people.

        Examples
        --------
        >>> StreamMemory(width=1000, streams=4, sublayers=60, element_bytes=2).sentence()[:31]
        'traffic 11.3 × a plain residual'
        """
        facts = self.as_dict()
        kept, recomputed = facts["kept_bytes"], facts["recomputed_kept_bytes"]
        if self.streams == 1:
            return f"the residual saves {bytes_text(kept)} per token for the backward ({self.sublayers} sublayers)"
        again = (
            f", {bytes_text(recomputed)} recomputed by blocks of {facts['recomputed_block']}"
            if recomputed < kept
            else ""
        )
        return (
            f"traffic {facts['traffic_ratio']:.3g} × a plain residual ({facts['fused_traffic_ratio']:.3g} × fused); "
            f"saved for the backward: {self.streams} ×, {bytes_text(kept)} per token{again}"
        )


def bytes_text(size: float) -> str:
    """A number of bytes for people, in powers of 1024.

    Parameters
    ----------
    size
        Bytes.

    Returns
    -------
    str

    Examples
    --------
    >>> bytes_text(500), bytes_text(480_000), bytes_text(3 * 2**30)
    ('500 B', '469 KiB', '3 GiB')
    """
    steps = min(int(math.log(size, 1024)), 4) if size >= 1 else 0
    # Of 1000 to 1023 units three digits would be scientific.
    value = size / 1024**steps
    return f"{value:.0f} {UNITS[steps]}" if value >= 1000 else f"{value:.3g} {UNITS[steps]}"


UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
