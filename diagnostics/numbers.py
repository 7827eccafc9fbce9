"""How is a number written in a sentence? Three significant digits, and powers of ten without zeros: 4.42e-7."""

from __future__ import annotations

__all__ = ["number"]


def number(value: float, *, digits: int = 3, sign: bool = False) -> str:
    """A number in a sentence.

    ``sign``: a plus too, as of a change.

    Examples
    --------
    >>> number(3012.7), number(0.05), number(4.42e-7), number(2e6)
    ('3013', '0.05', '4.42e-7', '2e6')
    >>> number(8.82e-6, sign=True), number(-0.5, digits=2)
    ('+8.82e-6', '-0.5')
    """
    form = ".0f" if 1000 <= abs(value) < 1e6 else f".{digits}g"
    mantissa, _, exponent = f"{value:{'+' if sign else ''}{form}}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
