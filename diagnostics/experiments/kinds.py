"""Which changes of a forward can be made? Name, what is changed, and what the model must have for it."""

from __future__ import annotations

from dataclasses import dataclass

from depthscope.diagnostics.errors import InputError, did_you_mean


@dataclass(frozen=True)
class ExperimentKind:
    """One kind of experiment.

    Parameters
    ----------
    name : str
        The word in Python and on the command line.
    unit : str
        What one experiment changes: a ``"block"``, a ``"connection"`` or the state at a ``"depth"``.
    sentence : str
        What is changed, as an equation or a description.
    streams : bool
        Whether the model must have several residual streams.
    """

    name: str
    unit: str
    sentence: str
    streams: bool = False


KINDS: dict[str, ExperimentKind] = {
    kind.name: kind
    for kind in (
        ExperimentKind("skip", "block", "the state after the block is the one before it"),
        ExperimentKind("identity", "connection", "H_res is the identity: no stream is mixed", streams=True),
        ExperimentKind(
            "uniform", "connection", "H_res is J/n: every stream gets the mean of all", streams=True
        ),
        ExperimentKind("drop_stream", "depth", "one stream is set to zero at one depth", streams=True),
        ExperimentKind("bypass", "depth", "the steps to the named depths are left out, all at once"),
    )
}
"""Every kind of experiment, by name."""


def kind_named(name: str) -> ExperimentKind:
    """The kind of a name; hyphens and underscores are the same.

    Examples
    --------
    >>> kind_named("drop-stream").unit
    'depth'
    """
    found = KINDS.get(str(name).replace("-", "_"))
    if found is None:
        raise InputError(f"no experiment {name!r}; {did_you_mean(str(name), KINDS)}")
    return found
