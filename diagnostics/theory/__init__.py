"""Which law stands beside a measured curve? Its values on the same axis, or the reason why it says nothing here."""

from diagnostics.theory.laws import LAWS, Law, Measured, Overlay, beside, law, null_law
from diagnostics.theory.noise import MARCHENKO_PASTUR
from diagnostics.theory.products import DRAWS, STOCHASTIC
from diagnostics.theory.residual import ALIGNED, cubic_collapse
from diagnostics.theory.wide import MeanField, mean_field_curve

__all__ = [
    "ALIGNED",
    "DRAWS",
    "LAWS",
    "MARCHENKO_PASTUR",
    "STOCHASTIC",
    "Law",
    "MeanField",
    "Measured",
    "Overlay",
    "beside",
    "cubic_collapse",
    "law",
    "mean_field_curve",
    "null_law",
]
