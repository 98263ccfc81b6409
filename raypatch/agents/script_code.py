"""The code inside a TorchScript archive, read before torch compiles any of it.

The language can open files and call services, so only calls that compute are let through.
What is handed to torch is a fresh archive with the code as it was understood here, written
out again: no second parser gets to see the stranger's own text. It is compiled, never run.
"""

from __future__ import annotations

import ast
import io
from pathlib import Path, PurePosixPath
from typing import TypeVar

from raypatch.agents.archives import check_archive, read_member, repacked
from raypatch.errors import AgentError

Node = TypeVar("Node", bound=ast.AST)

PLAIN_CALLS = frozenset({"annotate", "float", "getattr", "int", "unchecked_cast", "uninitialized"})
PRIMITIVES = frozenset({"NumToTensor", "RaiseException", "data", "unchecked_cast"})
ROOTS = frozenset({"torch", "ops", "__torch__"})
# What the layers that can be rebuilt consist of: a layer's operator and the numbers after its
# input, as torch's own class without options gives them.
LAYERS: dict[str, dict[str, tuple[object, ...]]] = {
    "Linear": {"linear": ()}, "Flatten": {"flatten": (1, -1)}, "Identity": {},
    "Dropout": {"dropout": ()}, "ReLU": {"relu": ()}, "Tanh": {"tanh": ()},
    "Sigmoid": {"sigmoid": ()}, "ELU": {"elu": (1, 1, 1)}, "LeakyReLU": {"leaky_relu": (0.01,)},
    "SiLU": {"silu": ()}, "GELU": {"gelu": ("none",)}, "SELU": {"selu": ()},
    "Softplus": {"softplus": (1, 20)}, "Mish": {"mish": ()}, "Hardtanh": {"hardtanh": (-1, 1)},
    "ReLU6": {"relu6": (), "hardtanh": (0, 6)},
}  # fmt: skip
# Checks on sizes and options around them.
AROUND = frozenset({"eq", "format", "ge", "gt", "le", "len", "lt", "ne"})
OPERATORS = AROUND.union({"to"}, *LAYERS.values())
CARRIED = ("data.pkl", "constants.pkl", "byteorder", "version", ".data/version")
MAX_CODE_BYTES = 16 << 20


def checked_script(file: Path) -> io.BytesIO:
    """The archive anew, with checked code only, for :func:`torch.jit.load`.

    Raises AgentError where the archive is no TorchScript, or its code would do more than
    compute.
    """
    members: dict[str, bytes] = {}
    for name in check_archive(file, str(file)):
        inside = name.partition("/")[2]
        if inside.startswith("code/") and inside.endswith(".py"):
            members[name] = _checked(read_member(file, name), f"{file}: {name}")
        elif inside in CARRIED or PurePosixPath(inside).parts[:1] in (("data",), ("constants",)):
            members[name] = read_member(file, name)
            if inside.endswith(".pkl") and b"classes" in members[name]:
                raise AgentError(f"{file}: {name}: holds an object of a library's class; refused")
    if not any(name.endswith("/data.pkl") for name in members):
        raise AgentError(f"{file}: not a readable TorchScript: it holds no module")
    return repacked(members)


def _checked(content: bytes, origin: str) -> bytes:
    if len(content) > MAX_CODE_BYTES:
        raise AgentError(f"{origin}: {len(content):,} bytes of code; refused")
    try:
        tree = ast.parse(content)
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {id(call) for function in functions for call in _nodes(function, ast.Call)}
        if any(id(call) not in inside for call in _nodes(tree, ast.Call)):
            raise AgentError(f"{origin}: calls something outside of its functions; refused")
        for function in functions:
            _check_function(function, origin)
        return f"{ast.unparse(tree)}\n".encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise AgentError(f"{origin}: not readable as TorchScript code: {error}") from None


def _check_function(function: ast.FunctionDef, origin: str) -> None:
    """A call may be of an operator that computes or of the script's own code, by a name that
    means nothing else; raises AgentError for any other."""

    def refuse(what: str) -> AgentError:
        return AgentError(
            f"{origin}: {function.name} {what[:100]}, which no layer known here needs and which "
            "may do more than compute; export the module instead: torch.export.save(...)"
        )

    names = _nodes(function, ast.Name)
    bound = [n.id for n in names if not isinstance(n.ctx, ast.Load)]
    bound += [n.arg for n in _nodes(function, ast.arg)]
    taken = (ROOTS | PLAIN_CALLS).intersection(bound)
    if taken:
        raise refuse(f"gives {min(taken)} another meaning")
    own = [
        assignment.targets[0].id
        for assignment in _nodes(function, ast.Assign)
        if len(assignment.targets) == 1
        and isinstance(assignment.targets[0], ast.Name)
        and _own(_dotted(assignment.value))
    ]
    calls = [_dotted(call.func) for call in _nodes(function, ast.Call)]
    for called in calls:
        alias = len(called) == 1 and 0 < own.count(called[0]) == bound.count(called[0])
        if not (alias or _computes(called)):
            raise refuse(f"calls {'.'.join(called)}")
    # Operators are only ever called: one that is handed on could be called by any name.
    handed_on = sum(n.id in ("torch", "ops") for n in names)
    if handed_on != sum(called[0] in ("torch", "ops") for called in calls):
        raise refuse("hands an operator on")


def _nodes(tree: ast.AST, kind: type[Node]) -> list[Node]:
    return [inner for inner in ast.walk(tree) if isinstance(inner, kind)]


def _dotted(node: ast.expr) -> tuple[str, ...]:
    """``a.b.c`` as a tuple; what is no plain name comes as ``"?"``."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        return (*_dotted(node.value), node.attr)
    return ("?",)


def _own(called: tuple[str, ...]) -> bool:
    return called[0] == "__torch__" and "classes" not in called


def _computes(called: tuple[str, ...]) -> bool:
    match called:
        case ("torch", operator):
            return operator.removesuffix("_") in OPERATORS
        case ("ops", "prim", primitive):
            return primitive in PRIMITIVES
        case (name,):
            return name in PLAIN_CALLS
        case ("torch" | "ops", *_):
            return False
    return _own(called) or called[-1] == "forward"
