"""Which quantities do metrics share? Derived from a run once and kept."""
