"""What does each rule of the reading change? ``python -m tests.models.price [words of rules | N]`` switches one off at a time.

Of all rules (half an hour), of some, or of those that at most N designs ask: these serve few networks. A rule is a function
whose annotation has a neutral answer: nothing, no, an empty text or list, or what it was given.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.outcome import outcome

ROOMS = ("depthscope.probes.reading", "depthscope.probes.structure")
EMPTY = {of.__name__: of for of in (list, set, dict, frozenset, str, tuple)}


@dataclass
class Rule:
    """One function, and the designs that ask it."""

    name: str
    neutral: Callable[..., Any]  # what the function answers where it is switched off, by what it takes
    asked_by: set[str] = field(default_factory=set)
    is_off: bool = False


def neutral_answer(function: FunctionType) -> Callable[..., Any] | None:
    """What the function answers where it is switched off; None where it has no such answer."""
    given = dict(function.__annotations__)
    answer = str(given.pop("return", ""))
    same = next((name for name, of in given.items() if of == answer), None)
    if same is not None and answer not in ("bool", "str", "int"):
        at = list(inspect.signature(function).parameters).index(same)
        return lambda args, kwargs: args[at] if at < len(args) else kwargs[same]
    if answer.endswith("| None") or answer == "bool":
        return lambda *_: None if answer != "bool" else False
    make = EMPTY.get(answer.partition("[")[0], tuple if answer.startswith(("Iter", "Sequence")) else None)
    return None if make is None else lambda *_: make()


def functions() -> Iterator[tuple[ModuleType | type, str, FunctionType]]:
    """The functions of the rooms, and what has them."""
    for room in ROOMS:
        for _, name, _ in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            module = importlib.import_module(name)
            own = [of for of in vars(module).values() if inspect.isclass(of) and of.__module__ == name]
            for holder in (module, *own):
                for attribute, of in list(vars(holder).items()):
                    is_own = isinstance(of, FunctionType) and of.__module__ == name
                    if is_own and of.__name__ == attribute:
                        yield holder, attribute, of


def switchable(asking: set[str]) -> Iterator[Rule]:
    """Every rule, which can be switched off from now on. ``asking``: the design that asks at present."""
    for holder, attribute, function in functions():
        if (answer := neutral_answer(function)) is None:
            continue
        rule = Rule(f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}", answer)

        def asked(*args: Any, _rule: Rule = rule, _run: FunctionType = function, **kwargs: Any) -> Any:
            _rule.asked_by |= asking
            return _rule.neutral(args, kwargs) if _rule.is_off else _run(*args, **kwargs)

        setattr(holder, attribute, asked)
        for module in [of for name, of in sys.modules.items() if name.startswith("depthscope.probes.")]:
            for name in [name for name, of in vars(module).items() if of is function]:
                setattr(module, name, asked)
        yield rule


def main() -> None:
    asking, designs = set[str](), {design.name: design for design in DESIGNS}
    rules = list(switchable(asking))
    before = {}
    for name, design in designs.items():
        asking.add(name)
        before[name] = str(outcome(design))
        asking.clear()
    most = int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else len(designs)
    words = [word for word in sys.argv[1:] if not word.isdigit()] or [""]
    for rule in sorted(rules, key=lambda rule: len(rule.asked_by)):
        if 0 < len(rule.asked_by) <= most and any(word in rule.name for word in words):
            rule.is_off = True
            after = {name: str(outcome(designs[name])) for name in sorted(rule.asked_by)}
            rule.is_off = False
            changed = [
                f"    {n}: {before[n][:60]} → {of[:99]}\n" for n, of in after.items() if of != before[n]
            ]
            sys.stdout.writelines([f"{rule.name}: {len(changed)} of {len(after)} change\n", *changed[:3]])


if __name__ == "__main__":
    main()
