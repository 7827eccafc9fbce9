"""What is the value of a formula in a dialect's row? Arithmetic over a connection's tensors, and nothing else of Python."""

from __future__ import annotations

import ast
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import mixing as kernel

LARGEST_SHAPE_NUMBER = 1e15  # beyond any size of a tensor; factorials would otherwise take all memory
MOST_PERMUTED = 8  # streams: 8! = 40320 matrices


class FormulaError(InputError):
    """A formula that cannot be read or computed."""


# --- what H_res may be made by; a matrix here has the orientation of the module


def sinkhorn(logits: np.ndarray, rounds: float, floor: float = 0.0, last: str = "columns") -> np.ndarray:
    """Sinkhorn of exp(logits), in ``rounds`` rounds that end on ``last`` (rows or columns of the logits).

    With a floor the first normalisation is a softmax to which it is added, and every later sum has it too, as in DeepSeek-V4.
    """
    if last not in ("rows", "columns"):
        raise FormulaError(f"sinkhorn ends on {last!r}; expected 'rows' or 'columns'")
    if not floor:
        return np.asarray(kernel.sinkhorn(logits, steps=int(rounds), last=last.removesuffix("s")))
    first, other = (-1, -2) if last == "columns" else (-2, -1)
    matrix = softmax(logits, axis=first) + floor
    matrix = matrix / (matrix.sum(axis=other, keepdims=True) + floor)
    for _ in range(int(rounds) - 1):
        for axis in (first, other):
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + floor)
    return matrix


def permutations(weights: np.ndarray) -> np.ndarray:
    """Σ_r weights_r P_r over the n! permutation matrices, in the order of `itertools.permutations`."""
    n = next((n for n in range(1, MOST_PERMUTED + 1) if math.factorial(n) == weights.size), 0)
    if not n:
        raise FormulaError(f"permutations of {weights.size} weights: no n! with n up to {MOST_PERMUTED}")
    order = np.array(list(itertools.permutations(range(n))))
    return np.einsum("r,rij->ij", weights.ravel(), np.eye(n)[order])


def kronecker(weights: np.ndarray) -> np.ndarray:
    """Kronecker product of the 2 × 2 matrices p I + q (swap), of one pair of weights (p, q) each."""
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    factors = [p * np.eye(2) + q * swap for p, q in weights.reshape(-1, 2)]
    return functools.reduce(np.kron, factors)


def fraction_reads(alpha: np.ndarray, n: float, f: float) -> np.ndarray:
    """Reads (f·v, f·n) of fractional hyper-connections, from columns that are f groups of v reads and n streams."""
    return _grouped(alpha, n, f)[:, : -int(n)].reshape(-1, int(f * n))


def fraction_mixing(alpha: np.ndarray, n: float, f: float) -> np.ndarray:
    """H_res (f·n, f·n), destination by source, of fractional hyper-connections."""
    return _grouped(alpha, n, f)[:, -int(n) :].reshape(int(f * n), int(f * n))


def fraction_writes(beta: np.ndarray, n: float, f: float, outer: str) -> np.ndarray:
    """H_post (n·f, f): beta has one weight for each stream and fraction read, the same for every fraction written.

    ``outer``: which of the two, ``"streams"`` or ``"fractions"``, is the outer part of a row's index.
    """
    streams, fractions = int(n), int(f)
    table = beta.reshape(streams, fractions)
    if outer == "fractions":
        return np.repeat(table.T.reshape(-1, 1), fractions, axis=1)
    return np.repeat(table[:, None], fractions, axis=1).reshape(-1, fractions)


def _grouped(alpha: np.ndarray, n: float, f: float) -> np.ndarray:
    return alpha.T.reshape(int(f), -1, int(f * n))


def square(values: np.ndarray) -> np.ndarray:
    """n² values as an n × n matrix, row after row."""
    side = math.isqrt(values.size)
    if side * side != values.size:
        raise FormulaError(f"square of {values.size} values, which is not a square number")
    return values.reshape(side, side)


def reshape(values: np.ndarray, *sizes: float) -> np.ndarray:
    """The values in another shape."""
    return values.reshape([int(size) for size in sizes])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": expit,
    "softmax": functools.partial(softmax, axis=-1),
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "transpose": np.transpose,
    "square": square,
    "reshape": reshape,
    "diagonal": np.diag,
    "identity": lambda n: np.eye(int(n)),
    "ones": lambda n: np.ones(int(n)),
    "one_hot": lambda index, n: np.eye(int(n))[int(index) % int(n)],
    "sinkhorn": sinkhorn,
    "permutations": permutations,
    "kronecker": kronecker,
    "fraction_reads": fraction_reads,
    "fraction_mixing": fraction_mixing,
    "fraction_writes": fraction_writes,
    "factorial": lambda n: math.factorial(int(n)) if n <= 2 * MOST_PERMUTED else LARGEST_SHAPE_NUMBER,
    "log2": np.log2,
}
GRAMMAR = (
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub),
    *(ast.Compare, ast.Gt, ast.GtE, ast.Lt, ast.LtE, ast.Eq),
    *(ast.Subscript, ast.Slice, ast.Tuple, ast.Load, ast.keyword),
)
"""What a formula consists of besides numbers, names and calls of `FUNCTIONS`: no attribute, and nothing that runs long."""


class Formula:
    """A formula such as ``2 * sigmoid(base[n:2*n])``, read once and computed for many connections.

    ``text``: numbers, names, ``+ - * / // %``, comparisons, slices, and calls of `FUNCTIONS`.
    Raises FormulaError: If it contains anything else.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self.names = frozenset(_names(tree.body, text))
            self._code = compile(tree, "<formula>", "eval")
        except FormulaError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormulaError(f"{text[:80]!r} is not a formula") from error
        self._tree = tree.body

    def value(self, names: Mapping[str, Any]) -> Any:
        """Compute it.

        Raises FormulaError: If a name has no value, or the shapes do not go together.
        """
        try:
            return eval(self._code, {"__builtins__": {}, **FUNCTIONS}, names)
        except FormulaError:
            raise
        except NameError as error:
            raise FormulaError(f"{self.text!r}: {error.name!r} is not a name that it can use") from error
        except (ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise FormulaError(f"{self.text!r} cannot be computed ({error})") from error

    def arguments(self, function: str, names: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by name where the formula as a whole is one call of ``function``; else None."""
        call = self._tree
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != function:
            return None
        parameters = FUNCTIONS[function].__code__.co_varnames
        given = dict(zip(parameters, call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        return {name: Formula(ast.unparse(argument)).value(names) for name, argument in given.items()}


def _names(tree: ast.AST, text: str) -> set[str]:
    """The names that a formula uses; raises where it does more than a formula may."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
                raise FormulaError(
                    f"{text[:80]!r} calls what is not a function; expected {', '.join(FUNCTIONS)}"
                )
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant):
            if type(node.value) not in (int, float, str):
                raise FormulaError(f"{text[:80]!r} contains {node.value!r}; expected numbers")
        elif not isinstance(node, GRAMMAR):
            raise FormulaError(
                f"{text[:80]!r} contains a {type(node).__name__}, which is not a part of a formula"
            )
    return found - FUNCTIONS.keys()
