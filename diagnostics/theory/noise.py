"""What would noise give? The Marchenko-Pastur law, the null of ranks and spectra."""

from depthscope.diagnostics.quantities.token_spectra import RANKS
from depthscope.diagnostics.theory.laws import Law

MARCHENKO_PASTUR = Law(
    name="marchenko_pastur",
    label="Marchenko-Pastur law",
    equation=r"\rho(\lambda) = \frac{\sqrt{(\lambda_+ - \lambda)(\lambda - \lambda_-)}}{2\pi\gamma\lambda}, \quad "
    r"\lambda_\pm = (1 \pm \sqrt{\gamma})^2, \quad \gamma = d/N",
    cite="marchenko1967distribution",
    assumption="independent entries of equal variance, at the same number of tokens and features",
    metrics=(*RANKS, "singular_value"),
    description="Ranks of noise: the null of these metrics, which every analysis contains.",
    function=None,  # every analysis contains its values as the metrics' nulls: nothing to compute again
)
