"""What happens when something in the forward is changed? Experiments that settle what a finding only suspects."""

from depthscope.diagnostics.experiments import KINDS, open_result, save_result
from depthscope.probes.interventions.changes import Plan, plan
from depthscope.probes.interventions.effects import ablate
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.patching import patch
from depthscope.probes.model.errors import InterventionError

__all__ = [
    "KINDS",
    "InterventionError",
    "ModelUnderTest",
    "Plan",
    "ablate",
    "open_result",
    "patch",
    "plan",
    "save_result",
]
