"""Which changes of a forward can be made, which one settles a finding, and what its result means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.diagnostics.numbers import number, percent


class ExperimentKind(NamedTuple):
    """One kind of experiment, in Python and on the command line.

    ``unit``: what one experiment changes: a ``"block"``, a ``"connection"`` or the state at a ``"depth"``.
    ``sentence``: what is changed, as an equation or a description.
    ``streams``: whether the model must have several residual streams.
    """

    name: str
    unit: str
    sentence: str
    streams: bool = False


_KINDS = (
    ExperimentKind("skip", "block", "the state after the block is the one before it"),
    ExperimentKind("identity", "connection", "H_res is the identity: no stream is mixed", streams=True),
    ExperimentKind("uniform", "connection", "H_res is J/n: every stream gets the mean of all", streams=True),
    ExperimentKind("drop_stream", "depth", "one stream is set to zero at one depth", streams=True),
    ExperimentKind("bypass", "depth", "the steps to the named depths are left out, all at once"),
)
KINDS: dict[str, ExperimentKind] = {kind.name: kind for kind in _KINDS}
"""Every kind of experiment, by name."""


def kind_named(name: str) -> ExperimentKind:
    """The kind of a name; hyphens and underscores are the same."""
    found = KINDS.get(str(name).replace("-", "_"))
    if found is None:
        raise InputError(f"no experiment {name!r}; {did_you_mean(str(name), KINDS)}")
    return found


SETTLED_BY: dict[str, str] = {
    # Steps that are said to do nothing: without them nothing changes.
    **dict.fromkeys(("same_representation", "idle_layer"), "bypass"),
    # A gain that is said to grow or fade by mixing: without mixing it does not.
    **dict.fromkeys(("gain_explosion", "attenuation", "negative_mixing"), "identity"),
    "stream_collapse": "uniform",
    # A stream that is said to carry nothing.
    **dict.fromkeys(("unused_stream", "passing_streams"), "drop_stream"),
}
"""Verdict name → the experiment that tells whether it matters to the model's output."""


def experiment_for(finding: Any, target: str = "CHECKPOINT") -> str | None:
    """The command of the experiment that would settle a finding.

    ``target``: the checkpoint to name in the command; a word that a reader replaces by default.
    Returns: Such as ``depthscope ablate CHECKPOINT --do bypass --depths 3-5``; None where no experiment on the forward would
    tell, as for gradients and for readings that are not proven.
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


def consequence_words(result: Mapping[str, Any]) -> str:
    """What leaving out the steps that a suspicion named has shown, in one sentence.

    Such as ``Without the steps from depth 5 to 15 the loss changes by +0.01 ± 0.02 (from 2.1).``
    """
    first, last = result["depths"]
    steps = f"the steps from depth {first} to {last}" if first < last else f"the step to depth {last}"
    parts = []
    if (change := result.get("loss_change")) is not None:
        reach = result.get("half_width")
        interval = "" if reach is None else f" ± {number(reach, digits=2)}"
        parts.append(
            f"the loss changes by {number(change, sign=True)}{interval} (from {number(result['loss'])})"
        )
    if result.get("output_change") is not None:
        parts.append(f"the output changes by {percent(result['output_change'])}")
    return f"Without {steps} {' and '.join(parts)}."
