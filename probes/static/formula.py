"""What is the value of a formula in a dialect's row, and which sizes give the shapes of a row? Arithmetic, nothing else."""

from __future__ import annotations

import ast
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import mixing as kernel

MOST_PERMUTED = 8  # streams: 8! = 40320 matrices
BEYOND = 1e15  # any size of a tensor: factorials would otherwise take all memory


class FormulaError(InputError):
    """A formula that cannot be read or computed."""


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


def square(values: np.ndarray) -> np.ndarray:
    """n² values as an n × n matrix, row after row."""
    side = math.isqrt(values.size)
    if side * side != values.size:
        raise FormulaError(f"square of {values.size} values, which is not a square number")
    return values.reshape(side, side)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": expit,
    "softmax": functools.partial(softmax, axis=-1),
    "tanh": np.tanh,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "transpose": np.transpose,
    "square": square,
    "reshape": lambda values, *sizes: values.reshape([int(size) for size in sizes]),
    "diagonal": np.diag,
    "identity": lambda n: np.eye(int(n)),
    "ones": lambda n: np.ones(int(n)),
    "sinkhorn": sinkhorn,
    "permutations": permutations,
    "factorial": lambda n: math.factorial(int(n)) if n <= 2 * MOST_PERMUTED else BEYOND,
}
GRAMMAR = (
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub),
    *(ast.Subscript, ast.Slice, ast.Tuple, ast.Load, ast.keyword),
)
"""What a formula consists of besides numbers, names and calls of `FUNCTIONS`: no attribute, and nothing that runs long."""


class Formula:
    """A formula such as ``2 * sigmoid(base[n:2*n])``, read once and computed for many connections.

    ``text``: numbers, names, ``+ - * / // %``, slices, and calls of `FUNCTIONS`.
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

    def arguments(self, function: Callable[..., Any], names: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by name where the formula as a whole is one call of ``function``; else None."""
        call = self._tree
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != function.__name__:
            return None
        given = dict(zip(function.__code__.co_varnames, call.args, strict=False))
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


# --- the sizes that shapes give

Sizes = dict[str, int]
Shape = tuple[Formula, ...]

# What a symbol may be; those that are not listed (D, r, …) are sizes of features without an upper limit.
RANGES = {"n": range(2, 65), "k": range(1, 17), "p": range(1, 65)}  # streams, queries, proposals


def shape_of(text: str) -> tuple[Shape, ...]:
    """The alternatives of a shape such as ``"n*(n+2), n*D"`` or ``"n | 1, n"``."""
    return tuple(tuple(map(Formula, alternative.split(","))) for alternative in text.split("|"))


def solve(shapes: Mapping[str, tuple[int, ...]], equations: Mapping[str, Sequence[Shape]]) -> list[Sizes]:
    """Every assignment of the symbols with which all tensors have the shapes of a row; ``shapes``: by role."""
    found: list[Sizes] = []
    # One number may be stored as () or as (1,).
    choices = [
        [
            list(zip(each, shape or (1,), strict=True))
            for each in equations[role]
            if len(each) == len(shape or (1,))
        ]
        for role, shape in shapes.items()
    ]
    for alternatives in itertools.product(*choices):
        pairs = [pair for each in alternatives for pair in each]
        found += [sizes for sizes in _assignments(pairs, {}) if sizes not in found]
    return found


def _assignments(pairs: Sequence[tuple[Formula, int]], known: Sizes) -> Iterator[Sizes]:
    """Assignments that satisfy all equations; the equation with the fewest unknown symbols is solved first."""
    if not pairs:
        yield known
        return
    formula, size = min(pairs, key=lambda pair: len(pair[0].names - known.keys()))
    unknown = sorted(formula.names - known.keys(), key=lambda name: len(RANGES.get(name, range(sys.maxsize))))
    if not unknown:
        if formula.value(known) == size:
            yield from _assignments([pair for pair in pairs if pair != (formula, size)], known)
        return
    for value in _values(formula, unknown[0], size, known, alone=len(unknown) == 1):
        yield from _assignments(pairs, {**known, unknown[0]: value})


def _values(formula: Formula, name: str, size: int, known: Sizes, *, alone: bool) -> Iterable[int]:
    """Values of a symbol that an equation allows; where it is the only unknown, those that solve it."""
    if name in RANGES:
        return (
            value for value in RANGES[name] if value <= size
        )  # a symbol is at most the size that it is part of
    if not alone:
        raise FormulaError(
            f"the size {formula.text!r} has several unknown factors; give each a shape of its own"
        )
    # Sizes of features are large, and their equations linear: two values give the line.
    at_zero, at_one = (float(formula.value({**known, name: value})) for value in (0, 1))
    slope = at_one - at_zero
    solution = (size - at_zero) / slope if slope else 0.0
    return [round(solution)] if solution >= 1 and solution == round(solution) else []
