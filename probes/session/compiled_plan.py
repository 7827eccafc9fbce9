"""Which values of a forward does compiled code hand out, and which do hooks show? What was read of it, divided among both."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.reading.graph import OUTPUT, PARAMETER, Graph, TracedValue
from depthscope.probes.reading.places import OperationPlaces
from depthscope.probes.session.compiled_regions import Region, Wanted
from depthscope.probes.session.graph_ops import CallInRegion, PlaceInRegion
from depthscope.probes.structure.model_structure import ShownTensor, Structure


@dataclass(frozen=True)
class Target:
    """A value that is handed out, and what it is."""

    value: TracedValue
    states: tuple[ShownTensor, ...] = ()  # that it is, or streams of them
    branch: tuple[int, int] | None = None  # chain, and position of its connection
    is_read: bool = False  # whether weights of connections are computed from it


@dataclass
class Part:
    """One call of a region in each forward."""

    wanted: Wanted
    targets: list[Target]
    parameters: list[tuple[TracedValue, str]] = field(default_factory=list)  # that are read, by their names


@dataclass
class CompiledPlan:
    """Where everything that is measured is made.

    ``outside``: what is made in no compiled part; None where no operation has to be looked at.
    ``parts``: by region and the number of its call.
    ``points``: of states that hooks outside of compiled parts show.
    """

    graph: Graph
    outside: OperationPlaces | None
    parts: Mapping[tuple[str, int], Part]
    points: tuple[ShownTensor, ...]

    @property
    def num_read(self) -> set[int]:
        """Numbers of the values that compiled parts have to hand out for the connections."""
        targets = {t.value.number for part in self.parts.values() for t in part.targets if t.is_read}
        return targets | {value.number for part in self.parts.values() for value, _ in part.parameters}


class Planner:
    """Divides the values of a forward that was read among compiled parts and what is around them.

    ``own``: by region and the number of its call which of the call's operations its forward ran, where hooks around it ran
    others.
    """

    def __init__(
        self,
        graph: Graph,
        structure: Structure,
        regions: Sequence[Region],
        own: Mapping[tuple[str, int], tuple[int, int]],
    ):
        self._graph, self._structure, self._own = graph, structure, own
        self._region_of = [self._around(number, regions) for number in range(len(graph.calls))]
        self._calls = self._calls_in_regions()

    def _around(self, number: int, regions: Sequence[Region]) -> tuple[Region, int] | None:
        """The region around a call, and the number of the region's own call."""
        path = self._graph.calls[number].path
        region = next((region for region in regions if region.contains(path)), None)
        if region is None:
            return None
        while self._graph.calls[number].path != region.path:
            number = self._graph.calls[number].parent
            if number < 0:
                return None
        return region, number

    def _calls_in_regions(self) -> list[CallInRegion | None]:
        """Each call as the compiler's graph names it: by the path from the region on, and its number there."""
        counts: dict[tuple[int, str], int] = {}
        found: list[CallInRegion | None] = []
        for number, around in enumerate(self._region_of):
            if around is None:
                found.append(None)
                continue
            region, root = around
            path = region.inner(self._graph.calls[number].path)
            count = counts.get((root, path), 0)
            counts[root, path] = count + 1
            found.append(CallInRegion(path, count))
        return found

    def plan(self, needed: Collection[int]) -> CompiledPlan:
        """The plan of a forward.

        ``needed``: numbers of the values by which the connections are read.
        Raises CaptureError: Where one of them is made in a way that compiled code does not show.
        """
        targets, points = self._states()
        outside = OperationPlaces(self._graph, self._graph.circumstances) if needed else None
        parameters: dict[tuple[str, int], list[tuple[TracedValue, str]]] = {}
        for value in (self._graph.values[number] for number in sorted(needed)):
            around = self._region_of[value.call] if value.call >= 0 else None
            if around is not None and value.made_at is not None:
                targets[value.number] = replace(targets.get(value.number, Target(value)), is_read=True)
            elif around is not None and value.kind == PARAMETER:
                parameters.setdefault(self._key(*around), []).append((value, self._name(value, around[0])))
            elif outside is not None and not outside.add(value, is_constant=value.kind == PARAMETER):
                path = self._graph.path(value) or "the model"
                raise CaptureError(f"a value of {path} is made by no operation")
        return CompiledPlan(self._graph, outside, self._parts(targets, parameters), tuple(points))

    def _states(self) -> tuple[dict[int, Target], list[ShownTensor]]:
        """The states, and outputs of branches, that compiled code hands out, and the states that hooks see."""
        targets: dict[int, Target] = {}
        points: list[ShownTensor] = []
        for state in self._structure.shown:
            value = state.point.value_in(self._graph)
            if value is None:
                raise CaptureError(f"{state.point.path or 'the model'} did not show its state")
            point = self._seen_outside(state, value)
            if point is not None:
                points.append(point)
            else:
                known = targets.get(value.number, Target(value))
                targets[value.number] = replace(known, states=(*known.states, state))
        for target in self._branches():
            known = targets.get(target.value.number, target)
            targets[target.value.number] = replace(known, branch=target.branch)
        return targets, points

    def _name(self, value: TracedValue, region: Region) -> str:
        """The name of a weight from a compiled module on."""
        name = self._graph.parameter_names.get(value.number, "")
        if not name or not region.contains(name.rpartition(".")[0]):
            raise CaptureError(
                f"a weight of the connections, {name or 'without a name'}, lies outside of what is compiled"
            )
        return region.inner(name)

    def _key(self, region: Region, root: int) -> tuple[str, int]:
        return region.path, self._graph.calls[root].number

    def _seen_outside(self, state: ShownTensor, value: TracedValue) -> ShownTensor | None:
        """A state with a point by which a hook sees it; None where compiled code makes and shows it."""
        point = state.point
        if point.at == "operation":
            return state if value.call < 0 or self._region_of[value.call] is None else None
        if self._goes_on(value):
            return None
        for shown in self._graph.shown.get(value.number, ()):
            around, call = self._region_of[shown.call], self._graph.calls[shown.call]
            if around is None or around[1] == shown.call:
                new = replace(point, at=shown.at, path=call.path, index=call.number, item=shown.item)
                return state._replace(point=new)
        return None

    def _goes_on(self, value: TracedValue) -> bool:
        """Whether the compiled part that makes a value computes with it: seen from outside its gradient is not all of it."""
        made = None if value.call < 0 else self._region_of[value.call]
        takers = [] if made is None else self._graph.takers(value)
        return any(taker.call >= 0 and self._region_of[taker.call] == made for taker in takers)

    def _branches(self) -> Iterator[Target]:
        """What branches give inside of compiled parts."""
        for number, chain in enumerate(self._structure.chains):
            if not self._structure.selection.stores_variable(chain, "branch_out"):
                continue
            for position, connection in enumerate(chain.connections):
                if connection.branch_path is None or self._structure.read is not None:
                    continue
                given = self._graph.shown_at(connection.branch_path, connection.branch_index, "output", 0)
                call = self._graph.call_of(connection.branch_path, connection.branch_index)
                if given is not None and self._region_of[call] is not None and given.made_at is not None:
                    yield Target(given, branch=(number, position))

    def _parts(
        self,
        targets: Mapping[int, Target],
        parameters: Mapping[tuple[str, int], list[tuple[TracedValue, str]]],
    ) -> dict[tuple[str, int], Part]:
        grouped: dict[tuple[str, int], list[Target]] = {key: [] for key in parameters}
        for number in sorted(targets):
            around = self._region_of[targets[number].value.call]
            if around is None or targets[number].value.made_at is None:
                where = self._graph.path(targets[number].value) or "the model"
                raise CaptureError(f"a state in {where} is made by no operation that compiled code shows")
            grouped.setdefault(self._key(*around), []).append(targets[number])
        parts = {}
        for key, of in grouped.items():
            places, operations = [], {}
            for target in of:
                call = self._calls[target.value.call]
                assert call is not None
                assert target.value.made_at is not None
                ran = self._graph.operations.get(target.value.call, [])
                is_forward = not call.path and call.number == 0
                start, end = self._own.get(key, (0, len(ran))) if is_forward else (0, len(ran))
                made_at = target.value.made_at
                places.append(
                    PlaceInRegion(call, made_at if made_at == OUTPUT else made_at - start, target.value.item)
                )
                operations[call] = tuple(ran[start:end])
            wanted = Wanted(tuple(places), tuple(operations.items()))
            parts[key] = Part(wanted, of, parameters.get(key, []))
        return parts
