"""What does capturing cost? Ratios to the same steps without probes: ``python -m benchmarks.capture``."""
