"""Which law goes with a measured curve? Its values on the same axis, or the reason why it does not apply."""

from depthscope.diagnostics.theory.catalogue import LAWS
from depthscope.diagnostics.theory.laws import Law, Measured, law
from depthscope.diagnostics.theory.mean_field import MeanField, mean_field_curve
from depthscope.diagnostics.theory.noise import MARCHENKO_PASTUR
from depthscope.diagnostics.theory.overlays import Overlay, null_law, overlay_laws
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
    "cubic_collapse",
    "law",
    "mean_field_curve",
    "null_law",
    "overlay_laws",
]
