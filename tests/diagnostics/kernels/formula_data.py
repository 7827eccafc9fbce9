"""What are kernels compared on? States made by formula, the same digits on every machine and in every year.

Entries come from a 64-bit mixer of their index (splitmix64) and from sums, products and quotients, which IEEE 754
fixes to the last bit: expected values that another library gave once stay valid.
"""

import numpy as np


def uniform(*shape: int, seed: int) -> np.ndarray:
    """Numbers between 0 and 1, by splitmix64."""
    z = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0xD1B54A32D192ED03 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).reshape(shape) * 2.0**-53


def noise(*shape: int, seed: int) -> np.ndarray:
    """Nearly Gaussian numbers of mean 0 and variance 1: sums of four uniform ones."""
    return (sum(uniform(*shape, seed=4 * seed + k) for k in range(4)) - 2.0) * 3.0**0.5
