"""Which experiment would settle a finding? A table from verdict to change, and the command that runs it."""

from __future__ import annotations

from typing import Protocol

from depthscope.diagnostics.experiments.kinds import KINDS

SETTLED_BY: dict[str, str] = {
    # Blocks that are said to do nothing: without them nothing changes.
    **dict.fromkeys(
        (
            "same_representation",
            "idle_layer",
            "curse_of_depth",
            "wasted_layer",
            "rank_collapse",
            "dimensional_collapse",
        ),
        "skip",
    ),
    # Matrices that are said to be the identity, or to learn nothing: the identity in their place changes nothing.
    **dict.fromkeys(
        ("stuck_at_identity", "some_connections_stuck", "unmoved_mixing", "decayed_mixing"), "identity"
    ),
    # A gain that is said to grow or fade by mixing: without mixing it does not.
    **dict.fromkeys(
        ("gain_explosion", "single_gain_explosion", "attenuation", "negative_mixing"), "identity"
    ),
    **dict.fromkeys(("uniform_mixing", "stream_collapse"), "uniform"),
    "constant_mixing": "mean",
    **dict.fromkeys(("sinkhorn_not_converged", "expansive_mixing"), "sinkhorn"),
    # A stream that is said to carry all, or nothing.
    **dict.fromkeys(
        ("dominant_stream", "loud_stream", "unread_stream", "unwritten_stream", "passing_streams"),
        "drop_stream",
    ),
    # Copies: what one loses, the others give back.
    "copied_streams": "rescue",
    "massive_activations": "massive",
}
"""Verdict name → the experiment that tells whether what it says matters to the model's output."""


class Placed(Protocol):
    """What of a finding is asked: see `depthscope.diagnostics.Finding`."""

    @property
    def verdict(self) -> str:
        """Name of the verdict."""

    @property
    def axis(self) -> str:
        """``"depth"``, ``"connection"`` or another one."""

    @property
    def first(self) -> int:
        """First position on the axis."""

    @property
    def last(self) -> int:
        """Last position on the axis, inclusive."""

    @property
    def stream(self) -> str | None:
        """The stream that it is about."""


def experiment_for(finding: Placed, target: str = "CHECKPOINT") -> str | None:
    """The command of the experiment that would settle a finding.

    ``target``: the checkpoint to name in the command; a word that a reader replaces by default.
    Returns: None where no experiment on the forward would tell, as for gradients and for readings that are not proven.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> experiment_for(SimpleNamespace(verdict="idle_layer", axis="depth", first=3, last=5, stream=None))
    'depthscope ablate CHECKPOINT --do skip --depths 3-5'
    """
    kind = KINDS.get(SETTLED_BY.get(finding.verdict, ""))
    if kind is None:
        return None
    words = ["depthscope", "ablate", target, "--do", kind.name.replace("_", "-")]
    if finding.axis in ("depth", "connection") and finding.first >= 0:
        span = str(finding.first) if finding.first == finding.last else f"{finding.first}-{finding.last}"
        words += [f"--{finding.axis}s", span]
    if kind.streams and finding.stream is not None and str(finding.stream).isdigit():
        words += ["--stream", str(finding.stream)]
    return " ".join(words)
