"""Which pages of the documentation are written by code? The page of methods: ``python -m benchmarks.docs.methods``."""
