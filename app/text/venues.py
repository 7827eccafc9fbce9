"""How wide is the text of a venue, and how large its letters? What figures, tables and the sample article are made for."""

from __future__ import annotations

from dataclasses import dataclass

from depthscope.diagnostics.errors import InputError

_INCH = 72.27  # TeX points


@dataclass(frozen=True)
class Venue:
    """The page of a venue.

    ``name``: key of `VENUES`.
    ``text, column``: inches across the text, and across one column; equal where there is one.
    ``height``: inches of text on a page, at most.
    ``body``: type size of the text in points.
    ``author_year``: whether its style loads natbib, which cites by authors and years.
    """

    name: str
    text: float
    column: float
    height: float
    body: int
    author_year: bool = False

    @property
    def two_columns(self) -> bool:
        """Whether the text is set in two columns."""
        return self.column < self.text

    @property
    def separation(self) -> float:
        """Inches between the columns."""
        return self.text - 2 * self.column if self.two_columns else 0.0


VENUES: dict[str, Venue] = {
    venue.name: venue
    for venue in (
        # The style files: icml2025.sty, neurips_2025.sty, iclr2025_conference.sty, acl.sty (16 cm across two columns of
        # 7.7 cm), cvpr.sty, IEEEtran.cls (516 pt and 252 pt). `plain` is an article on letter paper with margins of an inch.
        Venue("icml", 6.75, 3.25, 9.0, 10, author_year=True),
        Venue("neurips", 5.5, 5.5, 9.0, 10, author_year=True),
        Venue("iclr", 5.5, 5.5, 9.0, 10, author_year=True),
        Venue("acl", 16.0 / 2.54, 7.7 / 2.54, 24.7 / 2.54, 11, author_year=True),
        Venue("cvpr", 6.875, 3.25, 8.875, 10),
        Venue("ieee", 516 / _INCH, 252 / _INCH, 9.25, 10),
        Venue("plain", 6.5, 6.5, 9.0, 10),
    )
}
"""Venues by name."""


def venue_of(name: str) -> Venue:
    """A venue by its name."""
    if name not in VENUES:
        raise InputError(f"venue {name!r} is not known; expected {', '.join(VENUES)}")
    return VENUES[name]
