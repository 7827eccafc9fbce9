"""How is a number written in a sentence? Three significant digits, a minus sign, and powers of ten without zeros: 4.42e-7."""

from __future__ import annotations

__all__ = ["number", "percent"]

# What is smaller, as a fraction, is written as less than it: nobody reads 4.42e-7 %.
LEAST = 1e-5


def number(value: float, *, digits: int = 3, sign: bool = False) -> str:
    """A number in a sentence.

    ``sign``: a plus too, as of a change.

    Examples
    --------
    >>> number(3012.7), number(0.05), number(4.42e-7), number(2e6)
    ('3013', '0.05', '4.42e-7', '2e6')
    >>> number(8.82e-6, sign=True), number(-0.5, digits=2)
    ('+8.82e-6', '−0.5')
    """
    form = ".0f" if 1000 <= abs(value) < 1e6 else f".{digits}g"
    mantissa, _, exponent = f"{value:{'+' if sign else ''}{form}}".partition("e")
    # A hyphen is narrower than the digits, and is read as one.
    mantissa = mantissa.replace("-", "−")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def percent(value: float) -> str:
    """A fraction in a sentence, as a percentage.

    Examples
    --------
    >>> percent(0.00816), percent(4.42e-9), percent(0.0), percent(3.2)
    ('0.816 %', 'less than 0.001 %', '0 %', '320 %')
    """
    if 0 < abs(value) < LEAST:
        return f"less than {number(100 * LEAST)} %"
    return f"{number(100 * value)} %"
