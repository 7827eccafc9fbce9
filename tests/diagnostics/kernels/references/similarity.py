"""Similarity by scipy, scikit-learn, published formulas and what other packages once gave (``peer_values``)."""

import json

import numpy as np
import torch
from scipy import stats
from scipy.linalg import subspace_angles
from scipy.spatial import procrustes
from scipy.spatial.distance import cosine, pdist, squareform
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import KernelCenterer

from depthscope.diagnostics.kernels import similarity
from tests.diagnostics.kernels import peer_values
from tests.diagnostics.kernels.formula_data import walk
from tests.diagnostics.kernels.references.reference import PAIRS, Reference

PEER_VALUES = json.loads(peer_values.FILE.read_text())["values"]
TALL = PAIRS[:2]
KERNELS = [(peer_values.gram(x), peer_values.gram(y)) for x, y in PAIRS]
SIZES = {"narrow": peer_values.narrow(), "wide": peer_values.wide()}
LAYERS = [(walk(4, 120, 40, seed=60),), (walk(3, 30, 80, seed=70),)]


def published_value(key, ours, inputs, **options):
    """A number that another package computed once, for these inputs in float64."""
    return Reference(key, ours, lambda *_: PEER_VALUES[key], [inputs], narrow=False, batched=False, **options)


def centred(kernel):
    return KernelCenterer().fit_transform(kernel)


def alignment(k, q):
    return 1 - cosine(centred(k).ravel(), centred(q).ravel())


def aligned(x, y):
    return alignment(x @ x.T, y @ y.T)


def aligned_layers(x):
    return [[aligned(a, b) for b in x] for a in x]


def hsic_of_layers(x):
    return [[np.sum(centred(a @ a.T) * centred(b @ b.T)) / (len(a) - 1) ** 2 for b in x] for a in x]


def song(k, q):
    """Song et al., Eq. 5, with matrices of zeroed diagonals and a vector of ones."""
    n, ones = len(k), np.ones(len(k))
    k, q = (m - np.diag(np.diag(m)) for m in (k, q))
    sums = (ones @ k @ ones) * (ones @ q @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ q) + sums - 2 / (n - 2) * ones @ k @ q @ ones) / (n * (n - 3))


def unbiased(x, y):
    k, q = x @ x.T, y @ y.T
    return song(k, q) / np.sqrt(song(k, k) * song(q, q))


def of_minibatches(x, y):
    """Nguyen et al.: averages of Song's estimate, then the ratio."""
    grams = [(a @ a.T, b @ b.T) for a, b in zip(x, y, strict=True)]
    over = np.mean([song(k, q) for k, q in grams])
    return over / np.sqrt(np.mean([song(k, k) for k, _ in grams]) * np.mean([song(q, q) for _, q in grams]))


def radial(x):
    distances = pdist(x)
    return np.exp(-squareform(distances**2) / (2 * (0.5 * np.median(distances)) ** 2))


def canonical_correlations(x, y):
    return np.cos(subspace_angles(x - x.mean(0), y - y.mean(0)))


def projection_weighted(x, y):
    """Morcos et al.: correlations weighted by what of x their variates carry, by way of QR."""
    x, y = x - x.mean(0), y - y.mean(0)
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    u, rho, _ = np.linalg.svd(qx.T @ qy)
    variates = (qx @ u)[:, : len(rho)]
    weights = np.abs(variates.T @ x).sum(axis=1)
    return weights @ rho / weights.sum()


def of_leading(x, y):
    """Raghu et al.: the directions that hold 99 % of the variance of each side, then CCA."""
    bases = []
    for side in (x - x.mean(0), y - y.mean(0)):
        u, s, _ = np.linalg.svd(side, full_matrices=False)
        bases.append(u[:, : np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.99) + 1])
    return np.mean(np.cos(subspace_angles(*bases)))


def disparity(x, y):
    """scipy scales too: 1 − cos²."""
    wider = max(x.shape[1], y.shape[1])
    return procrustes(*(np.pad(m, ((0, 0), (0, wider - m.shape[1]))) for m in (x, y)))[2]


def neighbours(x, k):
    found = NearestNeighbors(n_neighbors=k, metric="cosine").fit(x).kneighbors(return_distance=False)
    near = np.zeros((len(x), len(x)))
    np.put_along_axis(near, found, 1.0, axis=1)
    return near


def agreement(x, y):
    return np.mean(np.sum(neighbours(x, 10) * neighbours(y, 10), axis=1) / 10)


def nearest_alignment(x, y):
    """Huh et al.: unbiased HSIC of kernels restricted to common neighbours, on unit rows, with torch's top k."""
    k, q = (torch.nn.functional.normalize(torch.tensor(m), dim=-1) for m in (x, y))
    k, q = k @ k.T, q @ q.T

    def near(kernel):
        others = kernel.clone().fill_diagonal_(float("-inf"))
        return torch.zeros_like(kernel).scatter_(1, others.topk(10, dim=1).indices, 1.0)

    def hsic(a, b):
        both = near(a) * near(b)
        return song((both * a).numpy(), (both * b).numpy())

    return hsic(k, q) / np.sqrt(hsic(k, k) * hsic(q, q))


def correlated(metric, compare):
    return lambda x, y: compare(pdist(x, metric), pdist(y, metric)).statistic


def noise_alignment(n, d_x, d_y):
    """Of Gaussian sides, by Wishart moments: E tr W² = m d (m + d + 1), E⟨W, W'⟩ = m d_x d_y, m = n − 1."""
    m = n - 1
    return m * d_x * d_y / np.sqrt(m * d_x * (m + d_x + 1) * m * d_y * (m + d_y + 1))


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "similarity.cka_from_hsic": (
        Reference(
            "cosine of two kernels that scikit-learn centres",
            lambda k, q: similarity.cka_from_hsic((k * q).sum(), (k * k).sum(), (q * q).sum()),
            alignment,
            [(centred(k), centred(q)) for k, q in KERNELS],
            narrow=False,
            batched=False,
        ),
    ),
    "similarity.linear_cka": (
        Reference("cosine of two kernels that scikit-learn centres", similarity.linear_cka, aligned, PAIRS),
        Reference(
            "Song et al., Eq. 5",
            lambda x, y: similarity.linear_cka(x, y, unbiased=True),
            unbiased,
            PAIRS,
            rtol=1e-8,
        ),
        *(
            published_value(f"ckatorch cka_base {size}", similarity.linear_cka, pair)
            for size, pair in SIZES.items()
        ),
        *(
            published_value(
                f"rsatoolbox cosine_cov {size}", similarity.linear_cka, pair
            )  # Diedrichsen et al. 2021
            for size, pair in SIZES.items()
        ),
        *(
            published_value(
                f"ckatorch cka_base unbiased {size}",
                lambda x, y: similarity.linear_cka(x, y, unbiased=True),
                pair,
            )
            for size, pair in SIZES.items()
        ),
    ),
    "similarity.hsic1": (
        Reference("Song et al., Eq. 5", similarity.hsic1, song, KERNELS, narrow=False, rtol=1e-7),
        published_value(
            "cka-pytorch hsic1", similarity.hsic1, tuple(map(peer_values.gram, peer_values.batches()))
        ),
        published_value(
            "torch-cka _HSIC float32",
            lambda k, q: similarity.hsic1(k[0], q[0]),
            tuple(map(peer_values.gram, peer_values.batches())),
            rtol=1e-4,
        ),
        published_value("repsim hsic song", lambda x, y: similarity.hsic1(x @ x.T, y @ y.T), SIZES["narrow"]),
    ),
    "similarity.hsic_matrix": (
        Reference(
            "kernels that scikit-learn centres",
            lambda x: similarity.hsic_matrix(x, unbiased=False),
            hsic_of_layers,
            LAYERS,
            batched=False,
        ),
        published_value("pytorch-cka hsic", similarity.hsic_matrix, (peer_values.layers(),)),
    ),
    "similarity.cka_matrix": (
        Reference(
            "cosine of two kernels that scikit-learn centres",
            similarity.cka_matrix,
            aligned_layers,
            LAYERS,
            batched=False,
        ),
        Reference(
            "Song et al., Eq. 5",
            lambda x: similarity.cka_matrix(x, unbiased=True),
            lambda x: [[unbiased(a, b) for b in x] for a in x],
            LAYERS,
            batched=False,
        ),
        published_value("repsim cka linear", similarity.cka_matrix, (peer_values.layers(),)),
    ),
    "similarity.cka_matrices": (
        Reference(
            "kernels that scikit-learn centres, and Song et al., Eq. 5",
            similarity.cka_matrices,
            lambda x: (np.array(aligned_layers(x)), np.array([[unbiased(a, b) for b in x] for a in x])),
            LAYERS,
            batched=False,
        ),
    ),
    "similarity.minibatch_cka": (
        Reference(
            "Nguyen et al., from Song's Eq. 5",
            lambda x, y: similarity.minibatch_cka(list(x), list(y)),
            of_minibatches,
            [peer_values.batches()],
            batched=False,
        ),
        published_value(
            "ckatorch cka_batch",
            lambda x, y: similarity.minibatch_cka(list(x), list(y)),
            peer_values.batches(),
        ),
    ),
    "similarity.cka_null": (
        Reference(
            "moments of Wishart matrices",
            similarity.cka_null,
            noise_alignment,
            [(100, 1000, 1000), (64, 8, 30)],
        ),
    ),
    "similarity.rbf_cka": (
        Reference(
            "scipy pdist, and kernels that scikit-learn centres",
            similarity.rbf_cka,
            lambda x, y: alignment(radial(x), radial(y)),
            PAIRS,
        ),
        *(
            published_value(f"ckatorch rbf {size}", lambda x, y: similarity.rbf_cka(x, y, fraction=0.8), pair)
            for size, pair in SIZES.items()
        ),
        published_value(
            "repsim cka rbf", lambda x, y: similarity.rbf_cka(x, y, fraction=1.0), SIZES["narrow"]
        ),
    ),
    "similarity.svcca": (
        Reference("scipy.linalg.subspace_angles of leading directions", similarity.svcca, of_leading, TALL),
        Reference(
            "scipy.linalg.subspace_angles",
            lambda x, y: similarity.svcca(x, y, energy=1.0),
            lambda x, y: np.mean(canonical_correlations(x, y)),
            TALL,
        ),
        published_value(
            "repsim cca pillai", lambda x, y: similarity.svcca(x, y, energy=1.0), SIZES["narrow"]
        ),
    ),
    "similarity.pwcca": (
        Reference("Morcos et al., by QR", similarity.pwcca, projection_weighted, TALL),
        published_value(
            "repsim pwcca",  # it averages both directions
            lambda x, y: (similarity.pwcca(x, y) + similarity.pwcca(y, x)) / 2,
            SIZES["narrow"],
        ),
    ),
    "similarity.procrustes": (
        Reference(
            "scipy.spatial.procrustes",
            lambda x, y: 1 - (1 - similarity.procrustes(x, y, squared=True) / 2) ** 2,
            disparity,
            PAIRS,
        ),
        Reference(
            "scipy.spatial.procrustes",
            similarity.procrustes,
            lambda x, y: np.arcsin(np.sqrt(disparity(x, y))),
            PAIRS,
        ),
    ),
    "similarity.rsa": (
        *(
            Reference(
                f"scipy {metric} distances, {name}",
                lambda x, y, metric=metric, name=name: similarity.rsa(x, y, metric=metric, compare=name),
                correlated(metric, compare),
                PAIRS,
                narrow=name == "pearson",  # float32 rounding swaps ranks of near ties
            )
            for metric in ("correlation", "cosine", "euclidean")
            for name, compare in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr))
        ),
        *(
            published_value(
                f"rsatoolbox spearman {metric} {size}",
                lambda x, y, metric=metric: similarity.rsa(x, y, metric=metric),
                pair,
            )
            for metric in ("correlation", "euclidean")
            for size, pair in SIZES.items()
        ),
        *(
            published_value(
                f"torchlens pearson {metric} {size}",
                lambda x, y, metric=metric: similarity.rsa(x, y, metric=metric, compare="pearson"),
                pair,
            )
            for metric in ("correlation", "cosine", "euclidean")
            for size, pair in SIZES.items()
        ),
    ),
    "similarity.mutual_knn": (
        Reference("sklearn.neighbors.NearestNeighbors", similarity.mutual_knn, agreement, PAIRS),
    ),
    "similarity.cknna": (
        Reference("Huh et al., with torch.topk", similarity.cknna, nearest_alignment, PAIRS),
    ),
}
