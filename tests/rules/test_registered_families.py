"""Every connection family that is declared is registered, and declares what detection and reading need."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

import pytest

from depthscope.probes.connections import families
from depthscope.probes.connections.families import FAMILIES
from depthscope.probes.connections.family import Family, ForwardFamily, PairedFamily
from depthscope.probes.static.dialect import known_dialects

REGISTER = "probes/connections/families/__init__.py"


def declared() -> dict[str, list[Family]]:
    """The families that each file of the folder declares."""
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    modules = {name: importlib.import_module(f"{families.__name__}.{name}") for name in names}
    return {
        name: [value for value in vars(module).values() if isinstance(value, Family)]
        for name, module in modules.items()
    }


def unregistered() -> list[str]:
    """One sentence for each family that is declared and not registered, and each file that declares none."""
    sentences = []
    for name, found in declared().items():
        if not found:
            sentences.append(
                f"probes/connections/families/{name}.py declares no family; "
                f"give it one, a ForwardFamily or a PairedFamily, named FAMILY"
            )
        sentences += [
            f"the family {family.name!r} of probes/connections/families/{name}.py is not registered; "
            f'add the line `"{name}",` to REGISTERED in {REGISTER}'
            for family in found
            if not any(family is known for known in FAMILIES)
        ]
    return sentences


def test_every_declared_family_is_registered():
    assert unregistered() == [], "\n".join(unregistered())


def test_an_unregistered_family_is_named_with_the_file_where_its_line_belongs(monkeypatch):
    # As if the first line of the register were forgotten.
    monkeypatch.setattr("tests.rules.test_registered_families.FAMILIES", FAMILIES[1:])
    (sentence,) = unregistered()
    assert "'returned'" in sentence
    assert REGISTER in sentence


def test_an_unregistered_file_is_named(monkeypatch, tmp_path):
    (tmp_path / "forgotten.py").write_text('"""A family that nobody declared."""\n')
    # A further folder of the package, so that no file is written into the checkout.
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    (sentence,) = unregistered()
    assert "families/forgotten.py declares no family" in sentence


def test_names_are_unique():
    assert [name for name, count in Counter(family.name for family in FAMILIES).items() if count > 1] == []
    rows = Counter(row.name for row in known_dialects())
    assert [name for name, count in rows.items() if count > 1] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_of_one_of_the_two_kinds_and_names_its_models(family):
    # A traced connection has no module of its own: its family only names it.
    assert isinstance(family, (ForwardFamily, PairedFamily)) or family.name == "traced"
    assert family.constrains, f"{family.name} names no model: constrains= maps each name to what it satisfies"
