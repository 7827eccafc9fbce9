"""Published numbers beside those that this code computes: ``python benchmarks/published.py``.

Numpy alone; nothing is trained. Each table names its source; a row that misses its tolerance is marked, and
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnostics.kernels import meanfield, mixing, rank, similarity  # noqa: E402

FIGURE_8 = ROOT / "tests" / "diagnostics" / "kernels" / "data" / "mhc_fig8.json"


@dataclass(frozen=True)
class Row:
    """One number twice.

    Parameters
    ----------
    name : str
        What it is.
    printed : float
        In the paper, or in closed form.
    found : float
        Here.
    tolerance : float
        How far apart they may be; two decimals are printed with an error of 0.005.
    """

    name: str
    printed: float
    found: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return bool(abs(self.printed - self.found) <= self.tolerance)


def matrices(family: str) -> dict[str, np.ndarray]:
    """The matrices of Figure 8 of the mHC paper, by name."""
    return {
        name: np.asarray(values, float) for name, values in json.loads(FIGURE_8.read_text())[family].items()
    }


def order_of_products() -> Iterator[Row]:
    """mHC Fig. 8: later layers stand on the left (arXiv 2512.24880); printed to 0.01, which moves HC by 3 %."""
    for family in ("HC", "mHC"):
        part = matrices(family)
        late, early, whole = part["P31-60"], part["P1-30"], part["P1-60"]
        size = np.abs(whole).max()
        error, turned = (np.abs(p - whole).max() / size for p in (late @ early, early @ late))
        yield Row(f"{family}: P31-60 P1-30 against P1-60, worst entry, share of largest", 0.0, error, 0.03)
        yield Row(
            f"{family}: the reversed order misses by more (1 = yes)", 1.0, float(turned > 3 * error), 0.0
        )


def truncated_sinkhorn() -> Iterator[Row]:
    """mHC Fig. 8: stopping Sinkhorn early breaks the column sums and non-expansiveness."""
    late = matrices("mHC")["P31-60"]
    columns = late.sum(0)
    yield Row("smallest backward sum of P31-60", 0.41, columns.min(), 0.02)
    yield Row("largest backward sum of P31-60", 1.50, mixing.backward_gain(late), 0.02)
    yield Row("spectral norm of P31-60", 1.14, mixing.operator_gain(late, 2), 0.02)


def uniform_start() -> Iterator[Row]:
    """A fresh mHC with zero logits mixes uniformly: gain 1 hides rank 1 (closed form)."""
    h = mixing.sinkhorn(np.zeros((6, 4, 4)))
    product = mixing.composite(h)
    yield Row("forward gain of six connections", 1.0, mixing.forward_gain(product), 1e-12)
    yield Row("backward gain of six connections", 1.0, mixing.backward_gain(product), 1e-12)
    yield Row("effective rank of their product", 1.0, rank.effective_rank(product), 1e-6)
    yield Row("differences between streams left", 0.0, np.exp(mixing.deflated_gain(h)[-1]), 1e-12)


def rank_collapse() -> Iterator[Row]:
    """Attention without skips loses rank doubly exponentially, skips prevent it (Dong et al. 2103.03404)."""
    alone, kept = (np.asarray(attention_residuals(skip)) for skip in (0.0, 1.0))
    logs = np.log(alone)
    for step in range(len(alone) - 1):
        ratio = logs[step + 1] / logs[step]
        yield Row(f"without skips: log r[{step + 1}] / log r[{step}]", 3.0, ratio, 1.0 if step == 0 else 0.3)
    yield Row("with skips: share of the residual left after as many layers", 1.0, kept[-1] / kept[0], 0.05)


def attention_residuals(skip: float, *, layers: int = 3, seed: int = 0) -> list[float]:
    """Residuals √(‖R‖₁ ‖R‖_∞) of tokens through layers of self-attention, from 1e-2 down to 1e-160.

    What all tokens share is taken out after each layer, so that the residual is followed far below the
    rounding of the states. The softmax is exact: less its uniform part, which does nothing to what is left, it
    is (e − mean e)/(N + Σe) with e = exp(score) − 1.
    """
    rng = np.random.default_rng(seed)
    tokens, width = 12, 32
    scoring = rng.standard_normal((width, width)) / np.sqrt(width)
    x = rng.standard_normal((tokens, width))
    x = 1e-2 * (x - x.mean(0)) / np.abs(x).sum(-1).max()
    sizes = [_residual(x)]
    for _ in range(layers):
        scores = x @ scoring @ x.T
        raised = np.expm1(scores)
        weights = (raised - raised.mean(-1, keepdims=True)) / (tokens + raised.sum(-1, keepdims=True))
        x = skip * x + weights @ x
        x = x - x.mean(0)
        sizes.append(_residual(x))
    return sizes


def _residual(x: np.ndarray) -> float:
    """√(‖R‖₁ ‖R‖_∞) of rows without a mean."""
    size = np.abs(x)
    return float(np.sqrt(size.sum(0).max() * size.sum(1).max()))


def pre_norm_growth() -> Iterator[Row]:
    """A pre-LN stack of independent unit branches: ‖h_l‖² = l, cos(h_l, h_l+1) = √(l/(l+1))."""
    rng = np.random.default_rng(0)
    branches = rng.standard_normal((33, 200, 512))
    branches /= np.linalg.norm(branches, axis=-1, keepdims=True)
    h = np.cumsum(branches, axis=0)
    for terms in (2, 8, 32):
        here, following = h[terms - 1], h[terms]
        law = meanfield.pre_ln_growth(terms)
        sizes = np.linalg.norm(here, axis=-1), np.linalg.norm(following, axis=-1)
        cosine = (here * following).sum(-1) / sizes[0] / sizes[1]
        yield Row(f"squared norm of {terms} terms", law.squared_norm, (sizes[0] ** 2).mean(), 0.02 * terms)
        yield Row(f"cosine of {terms} and {terms + 1} terms", law.cosine, cosine.mean(), 0.01)


def cka_of_noise() -> Iterator[Row]:
    """Biased CKA of independent data is near 1 for few tokens (Kornblith et al. 1905.00414; Song et al. 2012)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 100, 1000))
    yield Row("biased CKA, N = 100, d = 1000", 0.91, similarity.linear_cka(x, y), 0.01)
    yield Row("its null in closed form", 0.91, similarity.cka_null(100, 1000), 0.01)
    yield Row("unbiased CKA of the same data", 0.0, similarity.linear_cka(x, y, unbiased=True), 0.02)


def ranks_of_noise() -> Iterator[Row]:
    """Ranks of iid entries against the law of Marchenko and Pastur, N = 2000, d = 500."""
    n, d = 2000, 500
    x = np.random.default_rng(0).standard_normal((n, d))
    law = rank.marchenko_pastur(n, d)
    s = rank.singular_values(x)
    closed = {
        "entropy_rank": d * np.exp(-d / n / 2),
        "participation_ratio": d / (1 + d / n),
        "stable_rank": d / (1 + (d / n) ** 0.5) ** 2,
        "effective_rank": law.effective_rank,
    }
    for name, expected in closed.items():
        found = getattr(rank, f"{name}_of")(s)
        yield Row(name.replace("_", " "), expected, found, 0.02 * expected)


def traffic(n: int, d: int) -> tuple[int, int]:
    """Elements read and written per token by the residual connection of one sublayer (n = 1: a plain one)."""
    if n == 1:
        return 2 * d, d
    mappings = d * n, n * n + 2 * n
    read_branch, write_branch = (n * d + n, d), (d + n, n * d)
    mix, merge = (n * d + n * n, n * d), (2 * n * d, n * d)
    steps = (mappings, read_branch, write_branch, mix, merge)
    return sum(step[0] for step in steps), sum(step[1] for step in steps)


def memory_traffic() -> Iterator[Row]:
    """mHC Table 2: elements moved per token and sublayer, step by step against the printed totals."""
    d = 4096
    reads, writes = traffic(1, d)
    yield Row("residual: reads 2d", 2 * d, reads, 0)
    yield Row("residual: writes d", d, writes, 0)
    for n in (2, 4):
        reads, writes = traffic(n, d)
        yield Row(f"HC n = {n}: reads (5n+1)d + n² + 2n", (5 * n + 1) * d + n * n + 2 * n, reads, 0)
        yield Row(f"HC n = {n}: writes (3n+1)d + n² + 2n", (3 * n + 1) * d + n * n + 2 * n, writes, 0)


RESULTS = (
    order_of_products,
    truncated_sinkhorn,
    uniform_start,
    rank_collapse,
    pre_norm_growth,
    cka_of_noise,
    ranks_of_noise,
    memory_traffic,
)


def main(arguments: list[str] | None = None) -> int:
    """Print every table; 1 where a number misses its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object by result, for machines")
    asked = parser.parse_args(arguments)
    tables = {result: list(result()) for result in RESULTS}
    if asked.json:
        plain = {
            result.__name__: [
                {
                    "name": row.name,
                    "printed": float(row.printed),
                    "found": float(row.found),
                    "holds": row.holds,
                }
                for row in rows
            ]
            for result, rows in tables.items()
        }
        print(json.dumps(plain, indent=2))
    else:
        for result, rows in tables.items():
            print_table(result.__doc__, rows)
    return int(not all(row.holds for rows in tables.values() for row in rows))


def print_table(title: str, rows: list[Row]) -> None:
    """One table as text."""
    print(title.partition("\n")[0])
    print(f"  {'':<62} {'printed':>12} {'found':>12}")
    for row in rows:
        mark = "" if row.holds else f"  MISSED (tolerance {row.tolerance:g})"
        print(f"  {row.name:<62} {row.printed:>12.6g} {float(row.found):>12.6g}{mark}")
    print()


if __name__ == "__main__":
    sys.exit(main())
