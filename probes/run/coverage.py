"""What fired: every site of a model with how often it was expected and seen, and why it was not where it was not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from depthscope.probes.connections.proof import Evidence
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import PLAIN, Chain, Connection, HookPoint
from depthscope.probes.structure.model_structure import FINAL

NOT_ASKED = "not asked for; name it in sites="
NO_SUMS = "the blocks do not show how they add their branches to the state"


@dataclass(frozen=True)
class Coverage:
    """One site: its common name, the module that shows it, and the forwards in which it was expected and fired."""

    name: str
    site: str
    module: str
    layer: int
    chain: str
    expected: int
    fired: int
    why: str


def coverage(session: Session, evidence: Evidence) -> list[Coverage]:
    """The coverage of every site of every chain.

    Parameters
    ----------
    session : Session
        With its chains found and its forwards counted.
    evidence : Evidence
        The proofs, which tell how a branch's output was had.

    Returns
    -------
    list of Coverage
        In depth order; ``fired`` is below ``expected`` only where ``why`` says so.
    """
    rows: list[Coverage] = []
    for number, chain in enumerate(session.structure.chains):
        rows += _states(session, number, chain)
        rows += _connections(session, chain, evidence)
    return rows


def _states(session: Session, number: int, chain: Chain) -> Iterator[Coverage]:
    count, selection = session.num_forwards, session.options.selection
    captured = {(n, depth) for n, depth, _ in session.structure.captured}
    for depth, place in enumerate(chain.points):
        fired = (number, depth) in captured
        kept = selection.keeps(chain, depth)
        why = (
            "" if kept else NOT_ASKED if not fired else "seen for a proof only; name it in sites= to keep it"
        )
        yield _row(
            state_name(chain, depth),
            place.site,
            place,
            chain,
            count if kept else 0,
            count if fired else 0,
            why,
        )
    if not any(place.site == "mid" for place in chain.points):
        why = NO_SUMS if selection.inside_blocks else NOT_ASKED
        yield Coverage("blocks.{i}.hook_resid_mid", "mid", "", -1, chain.name, 0, 0, why)
    if chain.final is None:
        yield Coverage(
            "ln_final.hook_normalized", "final", "", -1, chain.name, 0, 0, "no norm takes the last state"
        )
    else:
        fired = (number, FINAL) in captured
        counted = count if fired else 0
        yield _row(
            "ln_final.hook_normalized",
            "final",
            chain.final,
            chain,
            counted,
            counted,
            "" if fired else NOT_ASKED,
        )


def state_name(chain: Chain, depth: int) -> str:
    """The name of a state that people know, ``blocks.{i}.hook_resid_…``."""
    place = chain.points[depth]
    return "hook_embed" if place.site == "embed" else f"blocks.{place.layer}.hook_resid_{place.site}"


def _connections(session: Session, chain: Chain, evidence: Evidence) -> Iterator[Coverage]:
    count, selection = session.num_forwards, session.options.selection
    for number, link in enumerate(chain.connections):
        for variable, why in _variables(session, link, evidence, number):
            kept = selection.keeps_variable(chain, variable)
            had = not why or why.startswith("solved")
            name = f"blocks.{link.layer}.{link.branch}.{variable}"
            yield Coverage(
                name,
                variable,
                link.path,
                link.layer,
                chain.name,
                count if kept and had else 0,
                count if kept and had else 0,
                why or ("" if kept else NOT_ASKED),
            )


def _variables(
    session: Session, link: Connection, evidence: Evidence, number: int
) -> Iterator[tuple[str, str]]:
    if link.style in PLAIN:
        yield from (("branch_in", ""), ("branch_out", ""))
        return
    parts, site = evidence.joints[number].parts, session.structure.sites[number]
    yield "h_res", "" if site.mixes else "nothing mixes: the identity"
    single = parts.write.shape[-1] == parts.branch_in.shape[-2] == 1
    several = "" if single else "several branch inputs: see read and write"
    gated = "read by gates per feature: no scalar weights exist" if parts.read is None else ""
    yield "h_pre", gated or several
    yield "h_post", several
    yield "branch_in", ""
    yield (
        "branch_out",
        "" if parts.branch_out is not None else "solved from the states; no module call showed it",
    )


def _row(
    name: str, site: str, place: HookPoint, chain: Chain, expected: int, fired: int, why: str
) -> Coverage:
    module = (
        f"{place.path} ({place.at})"
        if place.method == "forward"
        else f"{place.path}.{place.method} ({place.at})"
    )
    return Coverage(name, site, module, place.layer, chain.name, expected, fired, why)
