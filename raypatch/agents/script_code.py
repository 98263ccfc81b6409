"""The code inside a TorchScript archive, read before torch compiles and runs any of it.

The language can open files and call services, so only calls that compute are let through.
What is handed to torch is a fresh archive with the code as it was understood here, written
out again: no second parser gets to see the stranger's own text.
"""

from __future__ import annotations

import ast
import io
from pathlib import Path, PurePosixPath

from raypatch.agents.archives import check_archive, read_member, repacked
from raypatch.agents.operators import aten_schemas, only_computes
from raypatch.errors import AgentError

PLAIN_CALLS = frozenset({"annotate", "float", "getattr", "int", "unchecked_cast", "uninitialized"})
PRIMITIVES = frozenset({"NumToTensor", "RaiseException", "data", "unchecked_cast"})
# Operators on texts that make texts and numbers of them.
TEXT_OPERATORS = frozenset({"add", "eq", "format", "ge", "gt", "le", "len", "lt", "ne", "slice"})
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
            if inside.endswith(".pkl") and b"torch.classes" in members[name]:
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
        inside = {id(call) for function in functions for call in _calls(function)}
        if any(id(call) not in inside for call in _calls(tree)):
            raise AgentError(f"{origin}: calls something outside of its functions; refused")
        for function in functions:
            _check_calls(function, origin)
        return f"{ast.unparse(tree)}\n".encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise AgentError(f"{origin}: not readable as TorchScript code: {error}") from None


def _check_calls(function: ast.FunctionDef, origin: str) -> None:
    """A call may be of an operator that computes or of the script's own code."""
    assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
    values: dict[str, list[bool]] = {}
    for assignment in assigned:
        for target in assignment.targets:
            for name in [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]:
                values.setdefault(name, []).append(_own(_dotted(assignment.value)))
    for call in _calls(function):
        called = _dotted(call.func)
        alias = len(called) == 1 and all(values.get(called[0], [False]))
        if not (alias or _computes(called)):
            text = ast.unparse(call.func)
            raise AgentError(
                f"{origin}: {function.name} calls {text[:100]}, which may do more than compute; "
                "refused"
            )


def _calls(node: ast.AST) -> list[ast.Call]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]


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
            schemas = aten_schemas(operator)
            return operator in TEXT_OPERATORS or (
                bool(schemas) and all(map(only_computes, schemas))
            )
        case ("ops", "prim", primitive):
            return primitive in PRIMITIVES
        case (name,):
            return name in PLAIN_CALLS
        case ("torch" | "ops", *_):
            return False
    return _own(called) or called[-1] == "forward"
