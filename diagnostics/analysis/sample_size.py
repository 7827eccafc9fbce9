"""Is the sample large enough for the question? Notes on numbers that say more about the sample than the network."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.metrics.shape import FIRST, LAST

# Below these, heuristics: fewer tokens for unbiased CKA, for neighbours; fewer eigenvalues for a power law; fewer
# sequences for a standard error (its own relative error is 1 / √(2 (S − 1)): 35 % at 5).
TOKENS_FOR_CKA = 50
TOKENS_FOR_NEIGHBOURS = 100
EIGENVALUES = 20
SEQUENCES = 5
# A standard error of CKA above it leaves no picture.
ERROR_OF_CKA = 0.1


def notes(
    analysis: xr.Dataset, *, num_tokens: int, num_sequences: int, num_features: int, errors: bool = False
) -> dict[str, str]:
    """Say where the sample is too small for a metric.

    Parameters
    ----------
    analysis : Dataset
        Metrics under the names of the catalogue.
    num_tokens : int
        Real tokens of all sequences.
    num_sequences : int
        Sequences that hold some.
    num_features : int
        The width of a state.
    errors : bool
        Whether standard errors were asked for, of which there may be none.

    Returns
    -------
    dict of str to str
        One sentence by name of the metric; "standard errors" for all of them together.
    """
    counts = {"effective_rank": num_tokens, "entropy_rank": num_tokens, "participation_ratio": num_tokens}
    found = {name: _of_rank(analysis, name, count, "tokens") for name, count in counts.items()}
    found["gradient_rank"] = _of_rank(analysis, "gradient_rank", num_sequences, "sequences")
    found["alpha_req"] = _of_power_law(min(num_tokens - 1, num_features, LAST) - FIRST + 1)
    found["cka"] = _of_cka(analysis, num_tokens)
    found["intrinsic_dimension"] = found["mutual_knn"] = found["cknna"] = _of_neighbours(num_tokens)
    said = {name: note for name, note in found.items() if note and name in analysis}
    errors = errors or any(str(name).endswith("_stderr") for name in analysis)
    if errors and num_sequences < SEQUENCES:
        said["standard errors"] = _of_errors(num_sequences)
    return said


def _of_rank(analysis: xr.Dataset, name: str, count: int, what: str) -> str:
    """A rank that more tokens would raise; judged on all tokens, centred, where the analysis tells them apart."""
    if name not in analysis:
        return ""
    pick = {"scope": "data", "tokens": "all", "centering": "centred", "stream": "mean"}
    value = analysis[name].sel({dim: label for dim, label in pick.items() if dim in analysis[name].dims})
    largest = float(value.max()) if value.notnull().any() else 0.0
    if count >= 2 * largest:
        return ""
    at = int(value.isel(step=-1).argmax("depth"))
    return (
        f"{count} {what} for a rank of {largest:.3g} at depth {at}: more of them would raise it; read it as a share "
        "of its null"
    )


def _of_power_law(eigenvalues: int) -> str:
    if eigenvalues >= EIGENVALUES:
        return ""
    return (
        f"{max(eigenvalues, 0)} eigenvalues from the {FIRST}th on: a power law needs {EIGENVALUES} or more "
        "(heuristic); sample more tokens"
    )


def _of_cka(analysis: xr.Dataset, num_tokens: int) -> str:
    if num_tokens < TOKENS_FOR_CKA:
        return f"{num_tokens} tokens: the unbiased value swings widely below {TOKENS_FOR_CKA} (heuristic)"
    if "cka_stderr" not in analysis:
        return ""
    error = float(analysis["cka_stderr"].sel(estimator="unbiased", tokens="all").max())
    if not error > ERROR_OF_CKA:
        return ""
    return f"the standard error of the unbiased value reaches {error:.2f}: sample more sequences"


def _of_neighbours(num_tokens: int) -> str:
    if num_tokens >= TOKENS_FOR_NEIGHBOURS:
        return ""
    return (
        f"{num_tokens} tokens: neighbours are far apart, a dimension has a standard error of about "
        f"{100 / max(num_tokens, 1) ** 0.5:.0f} % of it, and chance alone shares many; take "
        f"{TOKENS_FOR_NEIGHBOURS} or more (heuristic)"
    )


def _of_errors(num_sequences: int) -> str:
    if num_sequences < 2:
        return "one sequence: no standard error is known; sample more sequences"
    own = 100 / (2 * (num_sequences - 1)) ** 0.5
    return f"over {num_sequences} sequences: themselves known to {own:.0f} % only; sample {SEQUENCES} or more"
