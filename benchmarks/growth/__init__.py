"""How does the cost of an analysis grow? Exponents, one factor at a time: ``python -m benchmarks.growth``."""
