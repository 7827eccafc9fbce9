"""Geometry by scipy's distances, Laplacian and regression, scikit-learn and scikit-dimension."""

import numpy as np
import skdim
from scipy.sparse import csgraph
from scipy.spatial.distance import cosine, pdist, squareform
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from depthscope.diagnostics.kernels import geometry
from tests.diagnostics.kernels.formula_data import noise, uniform
from tests.diagnostics.kernels.references.reference import EQUAL_PAIRS, FEW, SPECTRA, STATES, Reference

MATRICES = STATES + FEW
OUTLIERS = [(np.where(uniform(*x.shape, seed=20) > 0.99, 900.0, 0.1) * x,) for (x,) in STATES]
CLOUDS = [(noise(400, 3, seed=31) @ noise(3, 40, seed=32),), (noise(200, 6, seed=33) + 50.0,)]


def cosine_distances(x, y):
    """Cosine distances row by row."""
    return np.array([cosine(a, b) for a, b in zip(x, y, strict=True)])


def turning(x):
    steps = np.diff(x, axis=0)
    return np.arccos(1 - cosine_distances(steps[1:], steps[:-1])).mean()


def smoothness(adjacency):
    def energy(x):
        laplacian = csgraph.laplacian(adjacency(len(x)))
        return np.trace(x.T @ laplacian @ x) / np.sum(x * x)

    return energy


def massive(x):
    """Sun et al.: above 100, and above 1000 × the median magnitude."""
    return (np.abs(x) > 100) & (np.abs(x) > 1000 * np.median(np.abs(x)))


def slope(first, last):
    def of_values(values):
        last_one = min(last, len(values))
        index = np.arange(first, last_one + 1)
        logs = np.log(index), np.log(values[first - 1 : last_one])
        line, cov = np.polyfit(*logs, 1, w=index**-0.5, cov=True)
        return -line[0], cov[0, 0] ** 0.5

    return of_values


def variances(x):
    """Those of all principal components that centring leaves."""
    return PCA(min(len(x) - 1, x.shape[1]), svd_solver="full").fit(x).explained_variance_


def neighbour_distances(x):
    """Distances of every point to its two nearest neighbours."""
    ordered = np.sort(squareform(pdist(x)), axis=1)
    return ordered[:, 1], ordered[:, 2]


def line_through_the_origin(nearest, second):
    ratios = np.sort(np.log(second / nearest))[: int(0.9 * len(nearest))]
    level = -np.log1p(-np.arange(1, len(ratios) + 1) / len(nearest))
    return np.linalg.lstsq(ratios[:, None], level, rcond=None)[0][0]


def fit(of, **options):
    return lambda x: of(x, **options)[:2]


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "geometry.token_cosine": (
        Reference(
            "scipy.spatial.distance.pdist",
            geometry.token_cosine,
            lambda x: 1 - pdist(x, "cosine").mean(),
            MATRICES,
        ),
        Reference(
            "sklearn cosine_similarity of centred rows",
            lambda x: geometry.token_cosine(x, center=True),
            lambda x: cosine_similarity(x - x.mean(0))[np.triu_indices(len(x), 1)].mean(),
            MATRICES,
            rtol=1e-8,
        ),
    ),
    "geometry.row_cosine": (
        Reference(
            "scipy.spatial.distance.cosine",
            geometry.row_cosine,
            lambda x, y: 1 - cosine_distances(x, y),
            EQUAL_PAIRS,
        ),
    ),
    "geometry.angular_distance": (
        Reference(
            "scipy.spatial.distance.cosine",
            geometry.angular_distance,
            lambda x, y: np.mean(np.arccos(1 - cosine_distances(x, y))) / np.pi,
            EQUAL_PAIRS,
        ),
    ),
    "geometry.block_influence": (
        Reference(
            "scipy.spatial.distance.cosine",
            geometry.block_influence,
            lambda x, y: cosine_distances(x, y).mean(),
            EQUAL_PAIRS,
        ),
    ),
    "geometry.curvature": (
        Reference("scipy.spatial.distance.cosine", geometry.curvature, turning, MATRICES),
    ),
    "geometry.dirichlet_energy": (
        Reference(
            "scipy.sparse.csgraph.laplacian of the complete graph",
            geometry.dirichlet_energy,
            smoothness(lambda n: np.full((n, n), 1 / n)),
            MATRICES,
        ),
        Reference(
            "scipy.sparse.csgraph.laplacian of the path",
            lambda x: geometry.dirichlet_energy(x, graph="path"),
            smoothness(lambda n: np.eye(n, k=1) + np.eye(n, k=-1)),
            MATRICES,
        ),
    ),
    "geometry.massive_activations": (
        Reference("the paper's rule with numpy.median", geometry.massive_activations, massive, OUTLIERS),
    ),
    "geometry.massive_tokens": (
        Reference(
            "the paper's rule with numpy.median",
            geometry.massive_tokens,
            lambda x: massive(x).any(axis=1),
            OUTLIERS,
        ),
    ),
    "geometry.alpha_req": (
        Reference(
            "numpy.polyfit with weights on the variances of sklearn.decomposition.PCA",
            fit(geometry.alpha_req, first=3, last=60),
            lambda x: slope(3, 60)(variances(x)),
            STATES,
        ),
    ),
    "geometry.alpha_req_of": (
        Reference(
            "numpy.polyfit with weights",
            fit(geometry.alpha_req_of, first=5, last=38),
            lambda s: slope(5, 38)(s**2),
            SPECTRA[:1],
        ),
    ),
    "geometry.two_nn": (
        Reference(
            "skdim.id.TwoNN",
            geometry.two_nn,
            lambda x: skdim.id.TwoNN().fit(x).dimension_,
            CLOUDS,
            rtol=1e-7,
        ),
    ),
    "geometry.two_nn_of": (
        Reference(
            "numpy.linalg.lstsq of the distances by scipy",
            geometry.two_nn_of,
            line_through_the_origin,
            [neighbour_distances(x) for (x,) in CLOUDS],
            rtol=1e-7,
        ),
    ),
}
