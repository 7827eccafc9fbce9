"""How fast and accurate is the effective rank, from harmless to collapsed spectra? Compared with SVDs and Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.analysis.comparison import Comparison, Step, Tool, relative
from benchmarks.analysis.inputs import WIDTH, of_spectrum, spectra
from depthscope.diagnostics.kernels import rank


def entropy_of(singular: Any) -> float:
    """Exp of the entropy of the shares, in float64 (Roy and Vetterli)."""
    values = np.asarray(singular, dtype=np.float64)
    # 0 ln 0 is 0.
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def own(matrix: np.ndarray, *, convert: Callable[[np.ndarray], Any]) -> Step:
    return partial(rank.effective_rank, convert(matrix))


def gram(matrix: np.ndarray, *, dtype: torch.dtype) -> Step:
    """Eigenvalues in float64 of the smaller Gram matrix."""
    x = torch.from_numpy(matrix)
    # The nonzero eigenvalues of XXᵀ and XᵀX are the same; the smaller matrix is cheaper.
    side = x if x.shape[0] < x.shape[1] else x.T

    def step() -> float:
        # The product in dtype, eigenvalues in float64: the error is that of squaring in dtype.
        part = side.to(dtype)
        # Rounding makes eigenvalues near zero negative, whose root is NaN.
        return entropy_of(torch.linalg.eigvalsh((part @ part.T).double()).clamp_min(0).sqrt())

    return step


def svdvals(matrix: np.ndarray) -> Step:
    x = torch.from_numpy(matrix)
    return lambda: entropy_of(torch.linalg.svdvals(x))


def numpy_svd(matrix: np.ndarray) -> Step:
    return lambda: entropy_of(np.linalg.svd(matrix, compute_uv=False))


def truth(matrix: np.ndarray) -> np.ndarray:
    # An SVD of the matrix itself, which a Gram matrix squares: small singular values keep their digits.
    return np.asarray(entropy_of(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)))


BASELINE = "float32 Gram + eigvalsh"
TOOLS = {
    "depthscope, numpy": Tool(partial(own, convert=np.asarray)),
    "depthscope, torch": Tool(partial(own, convert=torch.from_numpy)),
    BASELINE: Tool(partial(gram, dtype=torch.float32)),
    "float64 Gram + eigvalsh": Tool(partial(gram, dtype=torch.float64)),
    "torch svdvals": Tool(svdvals),
    "numpy svd": Tool(numpy_svd),
}


def noise(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((tokens, WIDTH), dtype=np.float32)


def comparisons(quick: bool) -> dict[str, Comparison]:
    """Effective rank, its error and its time."""
    counts = (256,) if quick else (512, 4096)
    checked = counts[-1]
    known = spectra(min(checked, WIDTH))
    sizes: dict[str, Callable[[], np.ndarray]] = {f"noise, N {n}": partial(noise, n) for n in counts}
    sizes[f"collapse, N {checked}"] = partial(of_spectrum, known["collapse, rest 1e-5"], checked)
    comparison = Comparison(
        title="Effective rank of a matrix (N tokens, 1024 features)",
        tools=TOOLS,
        baseline=BASELINE,
        sizes=sizes,
        variants={name: partial(of_spectrum, values, checked) for name, values in known.items()},
        truths={"": truth},
        error=relative,
        note=NOTE.format(tokens=checked),
    )
    return {"ranks": comparison}


NOTE = """Errors are relative, of {tokens} tokens. The true value is that of a float64 SVD of the float32 matrix. The
entropy is taken in float64 everywhere, and the Gram matrix on the smaller side, its eigenvalues in float64. No peer on
PyPI gives this rank."""
