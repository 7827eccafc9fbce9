"""What is one line of a table of published numbers? A printed number beside the one found here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One number twice.

    Parameters
    ----------
    name : str
        What it is.
    printed : float or None
        In the paper, or in closed form; None where neither gives it.
    found : float
        Here.
    tolerance : float
        How far apart they may be; two decimals are printed with an error of 0.005.
    elsewhere : float or None
        What a paper prints for a model that is not public: of the same curve, not of the model that is measured.
    """

    name: str
    printed: float | None
    found: float
    tolerance: float = 0.0
    elsewhere: float | None = None

    @property
    def holds(self) -> bool:
        return self.printed is None or bool(abs(self.printed - self.found) <= self.tolerance)
