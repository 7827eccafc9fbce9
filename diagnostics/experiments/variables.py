"""Which variables do the results of experiments, a lens and Jacobians have? Dims, unit and meaning of each."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from depthscope.diagnostics.schema import Variable

TOKENS = ("experiment", "sample", "token")
ESTIMATES = ("", "_error", "_low", "_high")
"""Endings of a mean over sequences, its standard error, and the ends of its 95 % interval (Student's t)."""


def _with_estimates(name: str, dims: tuple[str, ...], meaning: str) -> dict[str, Variable]:
    words = ("mean over sequences", "standard error", "lower end of 95 %", "upper end of 95 %")
    return {
        f"{name}{ending}": Variable(dims, "f", f"{meaning}: {word}")
        for ending, word in zip(ESTIMATES, words, strict=True)
    }


UNITS = {
    "loss": "nats",
    "kl": "nats",
    "entropy": "nats",
    "output_change": "1",
    "agreement": "1",
    "effect": "1",
    "depth": "depth",
}
"""Units by a word of the variable's name."""

EFFECTS: dict[str, Variable] = {
    "base_loss": Variable(("sample", "token"), "f", "loss of the unchanged model"),
    "token_loss": Variable(TOKENS, "f", "loss of the changed model"),
    "token_kl": Variable(TOKENS, "f", "KL(unchanged ‖ changed) of the predictions"),
    "token_output_change": Variable(TOKENS, "f", "‖changed − unchanged output‖ / ‖unchanged output‖"),
    **_with_estimates("loss_change", ("experiment",), "loss of the changed model minus the unchanged one's"),
    **_with_estimates("kl", ("experiment",), "KL(unchanged ‖ changed) of the predictions"),
    **_with_estimates("output_change", ("experiment",), "relative change of the output"),
    "kind": Variable(("experiment",), "OTU", "what was changed"),
    "block": Variable(("experiment",), "i", "number of the block, −1 where it is none alone"),
    "depth": Variable(("experiment",), "i", "first depth that was changed"),
    "connection": Variable(("experiment",), "i", "number of the connection, −1 where it is none alone"),
    "stream": Variable(("experiment",), "i", "number of the stream, −1 where it is none alone"),
    "token_text": Variable(("sample", "token"), "OTU", "the token as text"),
}
"""Variables of the result of `depthscope.interventions.ablate`."""

CELLS = ("depth", "token", "stream")
PATCHES: dict[str, Variable] = {
    **_with_estimates(
        "effect",
        CELLS,
        "share of the difference between the two inputs that comes back: 0 corrupted, 1 clean",
    ),
    **_with_estimates("change", CELLS, "measure of the patched forward minus that of the corrupted one"),
    "patched": Variable((*CELLS, "sample"), "f", "measure of the patched forward"),
    "clean": Variable(("sample",), "f", "measure of the clean forward"),
    "corrupted": Variable(("sample",), "f", "measure of the corrupted forward"),
    "depth": Variable(("depth",), "iu", "depth of the state"),
    "token": Variable(("token",), "i", "position that was patched, −1 for all at once"),
    "stream": Variable(("stream",), "i", "stream that was patched, −1 for all at once"),
    "layer": Variable(("depth",), "i", "number of the block, −1 for the embedding"),
    "token_text": Variable(("sample", "token"), "OTU", "the token as text"),
}
"""Variables of the result of `depthscope.interventions.patch`."""

LENS_DIMS = ("depth", "stream")
LENS: dict[str, Variable] = {
    **_with_estimates("entropy", LENS_DIMS, "entropy of what the head reads from the state"),
    **_with_estimates("cross_entropy", LENS_DIMS, "loss of the next token by what the head reads"),
    **_with_estimates("kl", LENS_DIMS, "KL(output ‖ lens)"),
    **_with_estimates("agreement", LENS_DIMS, "share of tokens whose most likely prediction is the output's"),
    "prediction_depth": Variable(
        ("stream", "sample", "token"), "f", "first depth from which the most likely prediction stays the output's"
    ),
    "layer": Variable(("depth",), "iu", "block number, -1 for the embedding"),
}  # fmt: skip
"""Variables of the result of `depthscope.lens`."""


def declared(dataset: xr.Dataset, variables: Mapping[str, Variable]) -> xr.Dataset:
    """A result with the meaning and unit of every variable in its attributes; an undeclared one is a bug."""
    for name in (*dataset.data_vars, *dataset.coords):
        if name in dataset.dims and name not in variables:
            continue  # the label of a dimension
        variable = variables[str(name)]
        assert dataset[name].dims == variable.dims, f"{name}: {dataset[name].dims}, declared {variable.dims}"
        units = next((unit for word, unit in UNITS.items() if word in str(name)), None)
        dataset[name].attrs["long_name"] = variable.meaning
        if units is not None and dataset[name].dtype.kind == "f":
            dataset[name].attrs["units"] = units
    return dataset
