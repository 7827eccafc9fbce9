r"""What does a widened residual stream cost? Elements read and written, and activations saved for the backward.

Counts for one token, after section 4.3 and table 2 of the mHC paper (Xie et al. 2025, arXiv 2512.24880): n streams of width
d, L sublayers. Elements have no size in bytes of their own: multiply by that of the states' type.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from depthscope.diagnostics.errors import InputError


def elements_read(width: int, streams: int, *, fused: bool = False) -> int:
    r"""Elements that one sublayer's connection reads for a token.

    .. math:: (5n+1)d + n^2 + 2n; \quad \text{fused: } (3n+1)d + n^2 + 2n; \quad \text{one stream: } 2d

    The coefficients are computed from the streams (n d), the branch's input from the streams and H_pre (n d + n), the
    written output from the branch's and H_post (d + n), the mixed streams from the streams and H_res (n d + n²), and
    their sum from both (2 n d). A kernel that applies H_post and H_res and adds reads n d + d for the last three in
    place of (3n + 1) d. Coefficients that are parameters, and not computed from the streams, save n d.

    Parameters
    ----------
    width, streams
        d and n, at least 1.
    fused
        Whether one kernel writes, mixes and adds.

    Returns
    -------
    int

    Examples
    --------
    >>> elements_read(100, 1), elements_read(100, 4), elements_read(100, 4, fused=True)
    (200, 2124, 1324)
    """
    _require_sizes(width, streams)
    # A plain residual adds the branch's output to the state; there is no other operation to fuse with.
    if streams == 1:
        return 2 * width
    return ((3 if fused else 5) * streams + 1) * width + streams**2 + 2 * streams


def elements_written(width: int, streams: int, *, fused: bool = False) -> int:
    r"""Elements that one sublayer's connection writes for a token.

    .. math:: (3n+1)d + n^2 + 2n; \quad \text{fused: } (n+1)d + n^2 + 2n; \quad \text{one stream: } d

    See `elements_read`: the last three operations write n d each, a fused kernel n d in all.

    Parameters
    ----------
    width, streams
        d and n, at least 1.
    fused
        Whether one kernel writes, mixes and adds.

    Returns
    -------
    int

    Examples
    --------
    >>> elements_written(100, 1), elements_written(100, 4), elements_written(100, 4, fused=True)
    (100, 1324, 524)
    """
    _require_sizes(width, streams)
    if streams == 1:
        return width
    return ((1 if fused else 3) * streams + 1) * width + streams**2 + 2 * streams


def elements_moved(width: int, streams: int, *, fused: bool = False) -> int:
    """Elements that one sublayer's connection reads and writes for a token.

    Parameters
    ----------
    width, streams
        d and n, at least 1.
    fused
        Whether one kernel writes, mixes and adds.

    Returns
    -------
    int

    Examples
    --------
    >>> elements_moved(100, 1), elements_moved(100, 4), elements_moved(100, 4, fused=True)
    (300, 3448, 1848)
    """
    return elements_read(width, streams, fused=fused) + elements_written(width, streams, fused=fused)


def recomputed_block(streams: int, sublayers: int) -> int:
    r"""Sublayers of a block that is recomputed in the backward, for the smallest memory.

    .. math:: L_r^* = \sqrt{nL / (n + 2)}

    Rounded down or up, whichever keeps less.

    Parameters
    ----------
    streams, sublayers
        n and L, at least 1.

    Returns
    -------
    int
        From 1 to L.

    Examples
    --------
    >>> recomputed_block(4, 60)
    6
    """
    _require_sizes(streams, sublayers)
    optimum = math.sqrt(streams * sublayers / (streams + 2))
    choices = [min(max(round_(optimum), 1), sublayers) for round_ in (math.floor, math.ceil)]
    return min(choices, key=lambda block: kept_elements(1, streams, sublayers, block=block))


def kept_elements(width: int, streams: int, sublayers: int, *, block: int | None = None) -> int:
    r"""Activations of the streams that are saved for the backward, elements of a token in all sublayers.

    .. math:: n d L; \quad \text{recomputed: } n d \lceil L / L_r \rceil + (n + 2) d L_r

    Without recomputation the n streams before each connection. With it the streams at the begin of each block of L_r
    sublayers, and while one block runs backward its streams with the input and the output of each branch. The same
    with n = 1 is a plain residual.

    Parameters
    ----------
    width, streams, sublayers
        d, n and L, at least 1.
    block
        L_r; None keeps everything.

    Returns
    -------
    int

    Examples
    --------
    >>> kept_elements(100, 4, 60), kept_elements(100, 4, 60, block=6)
    (24000, 7600)
    """
    _require_sizes(width, streams, sublayers)
    if block is None:
        return streams * width * sublayers
    _require_sizes(block)
    return streams * width * math.ceil(sublayers / block) + (streams + 2) * width * block


@dataclass(frozen=True)
class StreamMemory:
    """What the streams of a network cost, by formula.

    Parameters
    ----------
    width, streams, sublayers : int
        d, n and L.
    element_bytes : int
        Size of an element of a state.
    """

    width: int
    streams: int
    sublayers: int
    element_bytes: int

    def traffic_ratio(self, *, fused: bool = False) -> float:
        """Elements moved by a connection, in units of what a plain residual moves (3 d)."""
        return elements_moved(self.width, self.streams, fused=fused) / elements_moved(self.width, 1)

    def as_dict(self) -> dict[str, Any]:
        """All counts: elements of a token and sublayer that are moved, bytes of a token that are kept."""
        n, d = self.streams, self.width
        block = recomputed_block(n, self.sublayers)
        kept = kept_elements(d, n, self.sublayers), kept_elements(d, n, self.sublayers, block=block)
        return {
            **asdict(self),
            "elements_read": elements_read(d, n),
            "elements_written": elements_written(d, n),
            "fused_elements_read": elements_read(d, n, fused=True),
            "fused_elements_written": elements_written(d, n, fused=True),
            "traffic_ratio": self.traffic_ratio(),
            "fused_traffic_ratio": self.traffic_ratio(fused=True),
            "kept_bytes": kept[0] * self.element_bytes,
            "recomputed_kept_bytes": kept[1] * self.element_bytes,
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


def _require_sizes(*sizes: int) -> None:
    for size in sizes:
        if size < 1:
            raise InputError(
                f"got a size of {size}; expected a width, a number of streams, or of sublayers from 1"
            )
