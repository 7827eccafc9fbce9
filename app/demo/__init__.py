"""Three small language models that differ in their connection alone: how they look, how they were trained, what is found."""

TITLES = {"residual": "residual", "hc": "HC", "mhc": "mHC"}
"""What each of the three is called in print; named here so that the demo's own process imports no torch."""
