"""What would the model predict from the state at each depth? The logit lens and a trained one."""

from depthscope.probes.lens.readings import HeadError, lens

__all__ = ["HeadError", "lens"]
