"""Which values do other libraries give? On states made by formula, stored in ``peer_values.json``.

These packages are heavy, pin old dependencies or change, so the suite reads their answers from the file. To make it
anew, in an environment of its own (2026-11-24, python 3.11, torch 2.13, numpy 2.4):

    pip install torch numpy scipy graphviz ckatorch==1.0.3 cka-pytorch==1.1.3 pytorch-cka==1.1.3 torch-cka==0.21 \
        repsim==0.1.5 rsatoolbox==0.3.2 torchlens==2.36.1
    python -m tests.diagnostics.kernels.peer_values
"""

import importlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np

from tests.diagnostics.kernels.formula_data import noise, structured, walk

FILE = Path(__file__).with_suffix(".json")
PACKAGES = ("ckatorch", "cka-pytorch", "pytorch-cka", "torch-cka", "repsim", "rsatoolbox", "torchlens")


def narrow() -> tuple[np.ndarray, np.ndarray]:
    """More tokens than features."""
    x = structured(400, 48, seed=1)
    return x, 0.5 * x[:, :32] + noise(400, 32, seed=9)


def wide() -> tuple[np.ndarray, np.ndarray]:
    """Fewer tokens than features."""
    x = structured(60, 200, seed=2)
    return x, 0.7 * x[:, :150] + noise(60, 150, seed=8)


def layers() -> np.ndarray:
    """Layers over the same tokens."""
    return walk(5, 200, 64, seed=3)


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Both sides in minibatches."""
    x = noise(6, 50, 24, seed=5)
    return x, 0.6 * x[..., :16] + noise(6, 50, 16, seed=7)


def gram(x: np.ndarray) -> np.ndarray:
    """All products of two tokens."""
    return x @ np.swapaxes(x, -1, -2)


def measured() -> dict[str, object]:
    """Ask every package."""
    return of_ckatorch() | of_hsic() | of_repsim() | of_dissimilarities()


def of_ckatorch() -> dict[str, object]:
    import torch
    from ckatorch import core, hsic, utils
    from scipy.spatial.distance import pdist, squareform

    def rbf(m: np.ndarray) -> torch.Tensor:  # its width is a multiple of a median that counts the diagonal
        middle = torch.median(torch.tensor(squareform(pdist(m)) ** 2)).item()
        return utils.rbf_kernel(torch.tensor(m), 0.8 * np.median(pdist(m)) / middle**0.5)

    def rbf_cka(x: np.ndarray, y: np.ndarray) -> float:
        k, q = rbf(x), rbf(y)
        return (hsic.hsic0(k, q) / torch.sqrt(hsic.hsic0(k, k) * hsic.hsic0(q, q))).item()

    found: dict[str, object] = {}
    for size, pair in (("narrow", narrow()), ("wide", wide())):
        x, y = map(torch.tensor, pair)
        found[f"ckatorch cka_base {size}"] = core.cka_base(x, y).item()
        found[f"ckatorch cka_base unbiased {size}"] = core.cka_base(x, y, unbiased=True).item()
        found[f"ckatorch rbf {size}"] = rbf_cka(*pair)
    found["ckatorch cka_batch"] = core.cka_batch(*map(torch.tensor, batches())).item()
    return found


def of_hsic() -> dict[str, object]:
    import cka_pytorch.hsic
    import torch
    import torch_cka

    tables = importlib.import_module("cka.hsic")  # the package pytorch-cka
    k, q = (torch.tensor(gram(side)) for side in batches())
    stack = torch.tensor(gram(layers()))
    off = [m[0].float().fill_diagonal_(0) for m in (k.clone(), q.clone())]
    plain = torch_cka.CKA._HSIC(type("OnCpu", (), {"device": "cpu"})(), *off)
    return {
        "cka-pytorch hsic1": cka_pytorch.hsic.hsic1(k, q).tolist(),
        "torch-cka _HSIC float32": plain,
        "pytorch-cka hsic": tables.hsic(stack, stack)[0].tolist(),
    }


def of_repsim() -> dict[str, object]:
    import repsim

    x, y = narrow()
    return {
        "repsim cka linear": repsim.cka(list(layers()), "linear", "gretton").tolist(),
        "repsim cka rbf": repsim.cka([x, y], "rbf", "gretton")[0, 1],
        "repsim hsic song": repsim.hsic([x, y], "linear", "song")[0, 1],
        "repsim cca pillai": repsim.cca([x, y], "pillai")[0, 1],
        "repsim pwcca": repsim.pwcca([x, y])[0, 1],
    }


def of_dissimilarities() -> dict[str, object]:
    import torchlens.repgeom
    from rsatoolbox import data, rdm

    found: dict[str, object] = {}
    for size, pair in (("narrow", narrow()), ("wide", wide())):
        for metric in ("correlation", "euclidean"):
            a, b = (rdm.calc_rdm(data.Dataset(side), method=metric) for side in pair)
            found[f"rsatoolbox spearman {metric} {size}"] = float(rdm.compare(a, b, "spearman")[0, 0])
        found[f"rsatoolbox cosine_cov {size}"] = float(rdm.compare(a, b, "cosine_cov")[0, 0])
        for metric in ("correlation", "cosine", "euclidean"):
            a, b = (torchlens.repgeom.rdm(side, metric=metric) for side in pair)
            found[f"torchlens pearson {metric} {size}"] = torchlens.repgeom.rdm_compare(a, b, "pearson")
        if size == "narrow":  # it measures distances: for fewer tokens than features they are the same
            ratio = torchlens.repgeom.effective_dimensionality(pair[0])["participation_ratio"]
            found["torchlens participation_ratio"] = ratio
    return found


if __name__ == "__main__":
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    FILE.write_text(json.dumps({"versions": versions, "values": measured()}, indent=1) + "\n")
