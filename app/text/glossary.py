"""What do the words mean? A sentence a term, of which the dashboard's tooltips and the glossary of the docs are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A word that is used in one sense.

    ``meaning``: one or two sentences.
    ``forms``: other forms of the same word, such as an adjective; a plural with s is known.
    ``not_written``: other spellings and names of the same thing, which no label of ours has.
    """

    meaning: str
    forms: tuple[str, ...] = ()
    not_written: tuple[str, ...] = ()


GLOSSARY: Mapping[str, Term] = {
    "residual stream": Term(
        "The state that every block reads and adds to, from the embedding to the last block."
    ),
    "stream": Term(
        "One of the n residual streams of a network with hyper-connections; a plain residual network has one.",
        not_written=("lane",),
    ),
    "depth": Term(
        "The number of a state: 0 is the embedding, and each sublayer that writes makes the next one."
    ),
    "relative depth": Term(
        "Depth divided by the depth of the run: 0 is the embedding, 1 the last state. It aligns runs."
    ),
    "connection": Term(
        "How one sublayer reads from the streams, mixes them and writes to them: H_pre, H_res and H_post."
    ),
    "H_res": Term(
        "The n × n matrix that mixes the streams at a connection; row i says what stream i becomes."
    ),
    "H_pre": Term("The n weights with which a sublayer reads the streams."),
    "H_post": Term("The n weights with which a sublayer writes to the streams."),
    "composite": Term(
        "Of the product of H_res from the embedding to a connection, and not of a single matrix."
    ),
    "Amax gain": Term(
        "The largest absolute row sum (forward) or column sum (backward) of a matrix: how far it stretches a signal (mHC)."
    ),
    "forward": Term("From the embedding to the last state, as the signal goes; row sums of H_res."),
    "backward": Term("From the loss to the embedding, as the gradient goes; column sums of H_res."),
    "noise baseline": Term(
        "The value expected of independent noise of the same shape: what the number would be without any structure.",
        forms=("baseline",),
        not_written=("null", "nulls", "null model"),
    ),
    "massive token": Term(
        "A token whose state is many times larger than the median; it can decide ranks and similarities alone.",
        forms=("without massive", "massive activation"),
    ),
    "effective rank": Term(
        "The exponential of the entropy of the singular values: in how many directions the states spread."
    ),
    "rank collapse": Term(
        "The tokens of a sequence become the same on their way through depth.", forms=("collapse",)
    ),
    "scope": Term(
        "Within sequences: each sequence by itself, then averaged; do its tokens become equal? Over all data: all tokens "
        "together; are few directions used?",
        forms=("within each sequence", "over all data"),
    ),
    "centring": Term(
        "Centred: the mean token is subtracted first.",
        forms=("centred",),
        not_written=("centering", "centered"),
    ),
    "CKA": Term(
        "Centred kernel alignment: how similar two sets of states are up to rotation and scale, from 0 to 1."
    ),
    "direction": Term(
        "Forward as the signal goes, from the embedding on; backward as the gradient goes, from the loss on."
    ),
    "reduction": Term("How the numbers of single tokens become one: their mean, or a percentile of them."),
    "estimator": Term(
        "Biased CKA is high for few tokens even where nothing is shared; unbiased CKA is 0 there on average."
    ),
    "95 % interval": Term(
        "Covers the value in 95 of 100 repetitions, with other sequences or other seeds (Student's t).",
        forms=("interval",),
    ),
    "finding": Term(
        "What a verdict says of a run, where a number crosses its limit: failure, warning or note."
    ),
    "verdict": Term("One number compared with limits that have a source."),
    "residual norm": Term("The root mean square over tokens of the size of the state."),
    "Jacobian": Term(
        "The derivative of a block's output with respect to its input: how it stretches small changes."
    ),
    "block influence": Term(
        "How much a block turns its input: 1 minus the cosine between its input and its output."
    ),
    "Dong residual": Term(
        "The distance from the nearest state that is the same for all tokens, relative to its size."
    ),
}
"""Term → what it means, in the order of the docs."""


def help_on(*texts: str) -> str | None:
    """The terms that occur in some texts with their meanings, as Markdown for a tooltip; None where there are none."""
    text = " ".join(texts)
    found = [term for term, entry in GLOSSARY.items() if _occurs(text, (term, *entry.forms))]
    # "Effective rank" tells more than "rank", and one that is part of another needs no line of its own.
    shown = [term for term in found if not any(term != other and term in other for other in found)]
    return "\n\n".join(f"**{term}**: {GLOSSARY[term].meaning}" for term in shown) or None


def _occurs(text: str, words: tuple[str, ...]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", text, re.IGNORECASE) for word in words)
