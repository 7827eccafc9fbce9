"""What do metrics share? Quantities that are derived from a run once: states, tokens, spectra, mixing matrices."""
