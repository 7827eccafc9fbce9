"""What is a reference? Another's way to the same number, and the states that both are asked about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.diagnostics.kernels.formula_data import noise, structured


@dataclass(frozen=True)
class Reference:
    """One comparison of a kernel.

    Parameters
    ----------
    source : str
        Who or what computes the value.
    ours : function
        Arrays in, value or named tuple of values out.
    theirs : function
        The same arrays, numpy in float64, in; the same values out.
    inputs : sequence of tuples
        What both are asked about; arrays are also tried as float32, as tensors and in a batch.
    rtol : float
        How near in float64.
    narrow : bool
        Whether float32 input is compared too, with the float64 value of the same numbers.
    batched : bool
        Whether a stack of the inputs must give the stack of the values.
    """

    source: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    rtol: float = 1e-9
    narrow: bool = True
    batched: bool = True


# Real sizes, more features than tokens, and few of both; noise has no structure, the others do.
STATES = [(noise(300, 64, seed=1),), (structured(400, 96, seed=2),), (structured(40, 256, seed=4),)]
FEW = [(structured(12, 5, seed=6),), (noise(30, 8, seed=7),)]
PAIRS = [(x, 0.5 * x[:, : x.shape[1] // 2] + noise(len(x), x.shape[1] // 2, seed=11)) for (x,) in STATES]
EQUAL_PAIRS = [(x, x + 0.3 * noise(*x.shape, seed=12)) for (x,) in STATES]
SPECTRA = [
    (np.geomspace(5.0, 1e-3, 40),),
    (1.0 / np.arange(1.0, 200.0) ** 0.7,),
    (np.r_[3.0, 3.0, 1.0, 0.0],),
]
