"""How many statements does a user of a tool write?"""

from __future__ import annotations

import ast
import inspect

from benchmarks.capture import tools

# What only the benchmark needs; a user has `run`, the step itself, without any tool.
HARNESS = ("Tool", "Captured", "CannotTakeError", "Case", "read_run", "run", "build", "no_statistics")


def statements(name: str) -> int:
    """Statements of Python that a user of a tool writes: those of its function in `tools`, and of what that calls there."""
    counted: dict[str, int] = {}
    waiting = [tools.TOOLS[name]]
    while waiting:
        function = waiting.pop()
        body = ast.parse(inspect.getsource(function)).body[0]
        counted[function.__name__] = sum(map(_of_user, ast.walk(body)))
        used = (
            {node.id for node in ast.walk(body) if isinstance(node, ast.Name)} - set(HARNESS) - set(counted)
        )
        here = [vars(tools)[each] for each in sorted(used) if each in vars(tools)]
        waiting += [each for each in here if getattr(each, "__module__", None) == tools.__name__]
    return sum(counted.values())


def _of_user(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef() | ast.ClassDef() | ast.Raise() | ast.If(body=[ast.Raise()]):
            return False
        case ast.Expr(value=ast.Constant() | ast.Yield()) | ast.Return(value=ast.Name()):
            return False
        case (
            ast.Expr(value=ast.Call(func=ast.Name(id=called)))
            | ast.Return(value=ast.Call(func=ast.Name(id=called)))
        ):
            return called not in vars(tools)
    return isinstance(node, ast.stmt)
