"""What is one line of a table of published numbers? A printed number, and the one found here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A published number, and the same number as computed here.

    Parameters
    ----------
    name : str
        What the number is.
    printed : float or None
        In the paper, or in closed form; None where neither gives it.
    found : float
        As computed here.
    tolerance : float
        Largest difference allowed; a number printed with two decimals has an error of 0.005.
    elsewhere : float or None
        The number that a paper prints for a model that is not public: of the same curve, of another model.
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
