"""What is every token of a run at one depth? Its place, text, size, and how far it is from the others and from its end."""

from __future__ import annotations

import numpy as np
import pandas as pd

from depthscope.app.readings.close_up import CloseUp
from depthscope.diagnostics.kernels.geometry.massive import massive_activations


def token_rows(close_up: CloseUp, depth: int, *, stream: str = "mean") -> pd.DataFrame:
    """One row for each real token of the sequences in memory.

    ``stream``: ``mean`` or the number of a stream.
    Returns: Columns ``sequence``, ``position``, ``text``, ``norm``, ``times median`` (norm over the median norm of the
    depth), ``distance to mean`` (of its sequence, over the norm), ``cosine with last state``, ``largest feature``,
    ``its value``, and ``massive`` (an entry above 100 and above 1000 × the median; Sun et al. 2024). NaN where
    undefined.
    """
    real = np.argwhere(close_up.mask)
    texts = [close_up.texts(sequence) for sequence in range(close_up.num_sequences)]
    frame = pd.DataFrame(real, columns=["sequence", "position"])
    frame["text"] = [texts[sequence][position] for sequence, position in real]
    x, last = close_up.states_at(depth, stream), close_up.states_at(-1, stream)
    tokens, ends = x[close_up.mask], last[close_up.mask]  # (tokens, features)
    norms = np.linalg.norm(tokens, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        frame["norm"] = norms
        known = norms[np.isfinite(norms)]
        frame["times median"] = norms / (np.median(known) if known.size else np.nan)
        means = np.stack(
            [
                x[sequence][mask].mean(axis=0) if mask.any() else np.full(x.shape[-1], np.nan)
                for sequence, mask in enumerate(close_up.mask)
            ]
        )
        frame["distance to mean"] = np.linalg.norm(tokens - means[real[:, 0]], axis=-1) / norms
        frame["cosine with last state"] = (tokens * ends).sum(axis=-1) / (
            norms * np.linalg.norm(ends, axis=-1)
        )
    # NaN is the largest: a state that is not finite is what one looks for.
    size = np.where(np.isnan(tokens), np.inf, np.abs(tokens))
    features = size.argmax(axis=-1) if len(real) else np.zeros(0, dtype=int)
    frame["largest feature"] = features
    frame["its value"] = np.take_along_axis(tokens, features[:, None], axis=-1)[:, 0]
    finite = np.isfinite(tokens).all(axis=-1)
    massive = massive_activations(tokens, mask=finite) if finite.any() else np.zeros_like(tokens, dtype=bool)
    frame["massive"] = np.asarray(massive.any(axis=-1))
    return frame


def found_tokens(rows: pd.DataFrame, words: str, *, sequence: int | None = None) -> pd.DataFrame:
    """Rows whose text contains some letters, the largest norms first; what is not finite comes before all.

    ``words``: searched in any case; empty finds every token.
    """
    chosen = pd.Series(True, index=rows.index)
    if words:
        chosen &= rows["text"].str.casefold().str.contains(words.casefold(), regex=False)
    if sequence is not None:
        chosen &= rows["sequence"] == sequence
    return rows[chosen].sort_values("norm", ascending=False, na_position="first", kind="stable")
