"""Which published numbers does depthscope reproduce? Tables of both: ``python -m benchmarks.published``."""
