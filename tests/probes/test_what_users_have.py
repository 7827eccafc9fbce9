"""Models of other packages are read as the table in the docs says: states as hooks see them, or unproven, or refused."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.diagnostics import schema
from tests.models.other_packages import MODELS, REFUSED, RIGHT, UNPROVEN, UserModel

TABLE = Path(__file__).parents[2] / "docs" / "how_to" / "what_you_have.md"
PLACE = re.compile(r"([<>])(?:(\w+):)?(.+)")


def in_table():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in TABLE.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: row[1] for row in rows if row[1].split(",")[0] in (RIGHT, UNPROVEN, REFUSED)}


def seen_by_hooks(model: nn.Module, batch, places: list[str]) -> list[torch.Tensor]:
    """What modules take or give, by hooks of our own."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def keep(place: str, value, item: str | None):
        if isinstance(value, (tuple, list)):
            value = value[int(item) if item and item.isdigit() else 0]
        found.setdefault(place, value.detach().clone())

    def before(place: str, name: str | None):
        return lambda module, args, kwargs: keep(
            place, kwargs[name] if name in kwargs else args or next(iter(kwargs.values())), None
        )

    def after(place: str, item: str | None):
        return lambda module, args, output: keep(place, output, item)

    for place in places:
        side, name, path = PLACE.fullmatch(place).groups()
        module = submodule(model, path)
        if side == "<":
            handles.append(module.register_forward_pre_hook(before(place, name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after(place, name)))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return [found[place] for place in places]


def submodule(model: nn.Module, path: str) -> nn.Module:
    if hasattr(model, "get_layer") and "." not in path:  # of Keras, which names its layers itself
        return model.get_layer(path)
    return model.get_submodule(path)


def canonical(state: torch.Tensor, *, tokens_first: bool) -> np.ndarray:
    """(B, T, D)."""
    if state.ndim == 2:
        return state.unsqueeze(1).numpy()
    if state.ndim == 4:
        return state.flatten(2).mT.numpy()
    return (state.transpose(0, 1) if tokens_first else state).float().numpy()


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_other_packages_are_read_as_the_table_says(case: UserModel):
    assert in_table()[case.name].split(",")[0] == case.outcome
    for package in case.packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    with warnings.catch_warnings():  # these packages warn as they like
        warnings.simplefilter("ignore")
        model, batch = case.build()
        model = case.seen(model)
        if case.outcome == REFUSED:
            with pytest.raises(ds.DepthscopeError, match=case.says):
                ds.describe(model, batch)
            return
        run = ds.capture(model, batch, gradients=False)
        proof = str(run.attrs["proof"])
        assert (proof == "proven") == (case.outcome == RIGHT), proof
        assert case.says in proof
        left_out = {part["module"] for part in run.attrs.get("not_covered", [])}
        assert left_out >= set(case.not_covered)
        for chain, places in case.states.items():
            residual = schema.chain_dataset(run, "trace", chain)["residual"].isel(stream=0)
            expected = seen_by_hooks(model, batch, list(places))
            assert residual.sizes["depth"] == len(expected)
            for depth, state in enumerate(expected):
                np.testing.assert_array_equal(
                    residual.isel(depth=depth).values,
                    canonical(state, tokens_first=case.tokens_first),
                    str(depth),
                )


def test_the_table_has_every_case():
    assert list(in_table()) == [case.name for case in MODELS]


def test_a_module_with_two_names_is_described():
    """As in peft's prompt tuning, where the embedding of the base model is also the wrapper's."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
            self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.other = self.first  # before the chain, by two names

        def forward(self, x):
            x = self.other(x)
            for layer in self.layers:
                x = x + layer(x)
            return x

    found = ds.describe(Wrapper(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert found.family == "residual"
