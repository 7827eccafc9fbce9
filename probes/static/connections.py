"""What are the weights of recognised connections at an input that adds nothing? And their products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.kernels import rank
from depthscope.probes.checkpoints.errors import CheckpointError, printable
from depthscope.probes.static.dialect import PARTS, Dialect, Values
from depthscope.probes.static.recognition import Found, Place, setting

LARGEST_SETTING = 10_000  # a heuristic: public models have 20 rounds of Sinkhorn and magnitudes of a few
SUM_ERROR = 1e-3  # error of a sum that counts as 1: Sinkhorn's floor is in it, some 1e-6 a stream and round; a heuristic


@dataclass(frozen=True, eq=False)
class MatrixFacts:
    """A static mixing matrix in numbers."""

    singular_values: np.ndarray
    row_sums: np.ndarray
    column_sums: np.ndarray

    @classmethod
    def of(cls, h_res: np.ndarray) -> MatrixFacts:
        """Of a matrix, destination by source."""
        return cls(kernel.singular_values(h_res), h_res.sum(axis=1), h_res.sum(axis=0))


@dataclass(frozen=True, eq=False)
class StaticConnection:
    """A connection at an input that adds nothing; rows of ``h_res`` are destinations. None: the files do not determine it."""

    module: str
    chain: str
    layer: int
    branch: str
    family: str
    streams: int
    width: int | None
    learns_mixing: bool
    dtypes: tuple[str, ...]  # of its tensors
    gates: dict[str, float]  # by part, the factor of what depends on the input
    h_res: np.ndarray | None
    h_pre: np.ndarray | None
    h_post: np.ndarray | None
    mixing: MatrixFacts | None
    note: str
    dialect: str
    constraint: str = ""  # what H_res satisfies, as measured


@dataclass(frozen=True, eq=False)
class StaticComposite:
    """The product of the static matrices of a chain, first to last."""

    chain: str
    connections: int
    streams: int
    forward_gain: float
    backward_gain: float
    singular_values: np.ndarray
    effective_rank: float


# --- the functions of a row


@dataclass(frozen=True)
class Settings:
    """The constants of a row for one checkpoint: values by the row's names, and what of them is only assumed."""

    values: Mapping[str, float]
    shown: Mapping[str, float]  # by the names of the configuration
    assumed: tuple[str, ...]


def settings_of(dialect: Dialect, config: Mapping[str, Any]) -> Settings:
    """The constants of a row, from ``config.json`` or the settings of a GGUF file.

    Raises CheckpointError: If a setting is no number that a model can have.
    """
    values, shown, assumed = {}, {}, []
    for name, constant in dialect.constants.items():
        given = {key: of for key in constant.keys if type(of := setting(config, key)) in (int, float)}
        if not given:
            assumed.append(constant.keys[0])
        key, value = next(iter(given.items()), (constant.keys[0], constant.default))
        # Rounds of Sinkhorn among them, each of which takes a microsecond.
        if not abs(value) <= LARGEST_SETTING:
            raise CheckpointError(
                f"config.json gives a connection a {key} of {printable(str(value), 20)}; expected at most {LARGEST_SETTING}: "
                "download it again"
            )
        values[name] = shown[key] = float(value)
    return Settings(values, shown, tuple(assumed))


def connection_of(
    found: Found, place: Place, tensors: Mapping[str, np.ndarray], constants: Mapping[str, float]
) -> StaticConnection:
    """A connection where the input adds nothing; ``tensors``: what its row reads, by role.

    Raises CheckpointError: Where a function of the row cannot be computed on these tensors.
    """
    row = found.dialect
    try:
        gates, weights = _computed(
            found, Values(**{"n": found.streams, **found.sizes, **constants, **tensors})
        )
    except (AttributeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"dialect {row.name!r}, at {found.module}: {error}; correct the row") from error
    h_res = weights.get("res")
    return StaticConnection(
        module=found.module,
        chain=place.chain,
        layer=place.layer,
        branch=place.branch,
        family=row.family,
        streams=found.streams,
        width=found.sizes.get("D"),
        learns_mixing=row.learns_mixing,
        dtypes=tuple(sorted({each.dtype for each in found.roles.values()})),
        gates=gates,
        h_res=h_res,
        h_pre=weights.get("pre"),
        h_post=weights.get("post"),
        mixing=None if h_res is None else MatrixFacts.of(h_res),
        note="; ".join(filter(None, (found.withheld, *found.notes))),
        dialect=row.name,
        constraint="" if h_res is None else constraint_of([h_res]),
    )


def _computed(found: Found, given: Values) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Gates and weights by part."""
    row, n = found.dialect, found.streams
    gates = {} if row.gates is None else row.gates(given)
    known = {part: float(np.ravel(gate)[0]) for part, gate in gates.items() if gate is not None}
    if found.withheld:
        return known, {}
    parts = {} if row.parts is None else row.parts(given)
    given = Values(**vars(given), **parts)
    weights = {}
    for part, function in zip(PARTS, (row.read, row.write, row.mixing), strict=True):
        # Without an optional tensor there is nothing to compute from.
        if function is None or parts.get(part, ()) is None:
            continue
        values, shape = np.asarray(function(given)), (n, n) if part == "res" else (n,)
        if values.shape != shape:
            raise InputError(f"H_{part} has the shape {values.shape}; expected {shape}")
        weights[part] = values.T if part == "res" and row.sources_in_rows else values
    return known, weights


def constraint_of(matrices: Sequence[np.ndarray]) -> str:
    """What mixing matrices of as many streams satisfy, as measured; empty without matrices of two or more streams."""
    if not matrices or len(matrices[0]) < 2:
        return ""
    return kernel.named_constraint(np.stack(matrices), tolerance=SUM_ERROR).words


# --- over depth


def composites(
    connections: Sequence[StaticConnection], broken: Collection[str] = ()
) -> Iterator[StaticComposite]:
    """One product for each chain and number of streams in which every matrix is known.

    ``broken``: chains with tensors that look like a connection and were not recognised: a product would leave it out.
    """
    chains: dict[tuple[str, int], list[StaticConnection]] = defaultdict(list)
    for connection in connections:
        # Matrices of an encoder and a decoder, or of other sizes, do not multiply.
        chains[connection.chain, connection.streams].append(connection)
    for (chain, streams), members in chains.items():
        matrices = [member.h_res for member in members if member.h_res is not None]
        if chain in broken or len(matrices) < len(members):
            continue
        # scaled to avoid overflow: free matrices of a deep model multiply beyond float64
        product, log_scale = kernel.composite(np.stack(matrices), return_log_scale=True)
        with np.errstate(over="ignore"):  # a gain beyond float64 is shown as infinite
            forward = np.exp(kernel.log_forward_gain(product, log_scale))
            backward = np.exp(kernel.log_backward_gain(product, log_scale))
            singular_values = kernel.singular_values(product) * np.exp(log_scale)
        yield StaticComposite(
            chain=chain,
            connections=len(members),
            streams=streams,
            forward_gain=float(forward),
            backward_gain=float(backward),
            singular_values=singular_values,
            # Of the scaled product: a rank does not depend on the scale, which may be infinite here.
            effective_rank=float(rank.effective_rank_of(kernel.singular_values(product))),
        )
