"""What is one line of a table of published numbers? A printed number, and the one found here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A published number, and the same number as computed here.

    ``name``: what the number is.
    ``printed``: in the paper, or in closed form; None where neither gives it.
    ``found``: as computed here.
    ``tolerance``: largest difference allowed; a number printed with two decimals has an error of 0.005.
    ``elsewhere``: the number that a paper prints for a model that is not public: of the same curve, of another model.
    """

    name: str
    printed: float | None
    found: float
    tolerance: float = 0.0
    elsewhere: float | None = None

    @property
    def agrees(self) -> bool:
        # A number of another model, `elsewhere`, is shown and never compared.
        return self.printed is None or bool(abs(self.printed - self.found) <= self.tolerance)
