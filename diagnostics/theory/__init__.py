"""Which law stands beside a measured curve? Its values on the same axis, or the reason why it says nothing here."""

from depthscope.diagnostics.theory.laws import LAWS, Law, Measured, Overlay, beside, law, null_law
from depthscope.diagnostics.theory.mean_field import MeanField, mean_field_curve
from depthscope.diagnostics.theory.noise import MARCHENKO_PASTUR
from depthscope.diagnostics.theory.products import DRAWS, STOCHASTIC
from depthscope.diagnostics.theory.residual import ALIGNED, cubic_collapse

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
