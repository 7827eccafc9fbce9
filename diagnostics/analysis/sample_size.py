"""Is the sample large enough for the question? Notes on numbers that depend on the sample more than on the network."""

from __future__ import annotations

import xarray as xr

# All heuristics of ours. Tokens at which the unbiased CKA of unrelated noise has a standard deviation of 0.03 (0.08 at 20,
# whatever the number of features; measured):
TOKENS_FOR_CKA = 50
# Sequences at which a standard error is itself known to 35 %, by 1 / √(2 (S − 1)):
SEQUENCES = 5
# An error of a tenth of the range of CKA.
ERROR_OF_CKA = 0.1


def notes(
    analysis: xr.Dataset, *, num_tokens: int, num_sequences: int, num_features: int, errors: bool = False
) -> dict[str, str]:
    """Sentences about metrics for which the sample is too small.

    ``analysis``: metrics under the names of the catalogue.
    ``errors``: whether standard errors were requested; there may be none.
    Returns: One sentence by name of the metric; "standard errors" for all of them together.
    """
    ranks = ("effective_rank", "participation_ratio")
    found = {name: _of_rank(analysis, name, num_tokens, "tokens") for name in ranks}
    found["gradient_rank"] = _of_rank(analysis, "gradient_rank", num_sequences, "sequences")
    found["cka"] = _of_cka(analysis, num_tokens)
    sentences = {name: note for name, note in found.items() if note and name in analysis}
    # Means over sequences have errors in any case; where errors were not asked for, there is no note about them.
    if errors and num_sequences < SEQUENCES:
        sentences["standard errors"] = _of_errors(num_sequences)
    return sentences


def _of_rank(analysis: xr.Dataset, name: str, count: int, what: str) -> str:
    """A note on a rank that more tokens would raise; judged on all tokens, centred, where the analysis has variants."""
    if name not in analysis:
        return ""
    pick = {"scope": "data", "tokens": "all", "centering": "centred", "stream": "mean"}
    value = analysis[name].sel({dim: label for dim, label in pick.items() if dim in analysis[name].dims})
    largest = float(value.max()) if value.notnull().any() else 0.0
    # Heuristic: 1 / PR is about 1 / N + 1 / (true value), so that at N = 2 PR the true value is twice as large.
    if count >= 2 * largest:
        return ""
    at = int(value.isel(step=-1).argmax("depth"))
    return (
        f"{count} {what} for a rank of {largest:.3g} at depth {at}: more of them would raise it; read it as a "
        "fraction of its noise baseline"
    )


def _of_cka(analysis: xr.Dataset, num_tokens: int) -> str:
    if num_tokens < TOKENS_FOR_CKA:
        return f"{num_tokens} tokens: the unbiased value swings widely below {TOKENS_FOR_CKA} (depthscope's default)"
    if "cka_stderr" not in analysis:
        return ""
    error = float(analysis["cka_stderr"].sel(estimator="unbiased", tokens="all").max())
    if not error > ERROR_OF_CKA:
        return ""
    return f"the standard error of the unbiased value reaches {error:.2f}: sample more sequences"


def _of_errors(num_sequences: int) -> str:
    if num_sequences < 2:
        return "one sequence: no standard error is known; sample more sequences"
    # A standard error of S sequences has itself a relative one of 1 / √(2 (S − 1)).
    own, of_four_times = (100 / (2 * (count - 1)) ** 0.5 for count in (num_sequences, 4 * num_sequences))
    return (
        f"error bars come from {num_sequences} sequences and are themselves uncertain by about {own:.0f} %; "
        f"{4 * num_sequences} give {of_four_times:.0f} %"
    )
