"""Are the analyzers accurate, and how fast? Comparisons with other packages: ``python -m benchmarks.analysis``."""
