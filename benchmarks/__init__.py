"""How fast and how accurate is depthscope, and what has been published? Run from the root of the repository.

``python -m benchmarks.capture`` the cost of capturing; ``benchmarks.analysis`` accuracy, time and memory of the analyzers;
``benchmarks.growth`` exponents of the cost; ``benchmarks.published`` published numbers; ``benchmarks.docs.methods`` the page
of methods, from the declarations. The first three write pages of ``docs`` with ``--markdown``.
"""
