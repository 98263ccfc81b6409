"""Guards: branches of a forward that only raise, as ``assert x.dim() == 2``. They do not decide
what a network computes, so that tracing can go on where they ask for what is not known yet.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType

from torch.distributions import Distribution

# Between asking for a truth value and the jump that it decides.
ASKING = {"TO_BOOL", "CACHE", "EXTENDED_ARG"}
if sys.version_info >= (3, 13):
    ASKING.add("COMPARE_OP")  # may ask itself
# Where a branch that does not only raise ends.
ENDING = ("RETURN", "YIELD", "FOR_ITER", "RERAISE")
# Python itself catches these, in loops and where attributes and items are looked up.
CAUGHT_BY_PYTHON = {
    *("StopIteration", "StopAsyncIteration", "AttributeError", "IndexError", "KeyError"),
}


def truth_that_goes_on(frame: FrameType, root: CodeType) -> bool | None:
    """Python asks for a truth value in ``frame``: with which one the code goes on, where the other
    one only leads to a ``raise``. None where neither does, or where somebody between that and the
    call of ``root`` may catch the error."""
    caller = frame.f_back
    while caller is not None and caller.f_code is not root:
        home = str(caller.f_globals.get("__name__")).split(".")[0]
        # Torch's own functions hand errors on.
        if home not in ("torch", "raypatch") and _may_catch(caller.f_code, caller.f_lasti):
            return None
        caller = caller.f_back
    return _truth_that_goes_on(frame.f_code, frame.f_lasti)


@lru_cache(maxsize=1024)
def _truth_that_goes_on(code: CodeType, asked_at: int) -> bool | None:
    instructions = list(dis.get_instructions(code))
    at = {instruction.offset: number for number, instruction in enumerate(instructions)}

    def raises(number: int) -> bool:
        for _ in instructions:
            instruction = instructions[number]
            name = instruction.opname
            if name == "RAISE_VARARGS":
                return not _may_catch(code, instruction.offset)
            if name.startswith(ENDING) or _is_conditional(name):
                return False
            if instruction.argval in CAUGHT_BY_PYTHON:
                return False
            jumps = instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs
            number = at[instruction.argval] if jumps else number + 1
        return False

    number = at.get(asked_at, len(instructions) - 1)
    while instructions[number].opname in ASKING:
        number += 1
    jump = instructions[number]
    if not _is_conditional(jump.opname) or "NONE" in jump.opname:
        return None
    ways = {"IF_TRUE" in jump.opname: at[jump.argval], "IF_FALSE" in jump.opname: number + 1}
    fails = {truth: raises(way) for truth, way in ways.items()}
    return None if fails[True] == fails[False] else fails[False]


@lru_cache(maxsize=1024)
def _may_catch(code: CodeType, offset: int) -> bool:
    """Whether an error that is raised there may be caught in the same function."""
    if code.co_name.startswith("__") and code.co_name != "__call__":
        return True  # a protocol of Python's, to which errors may say something
    if sys.version_info < (3, 11):  # there is no table of what is caught where
        return any(i.opname.startswith("SETUP_") for i in dis.get_instructions(code))
    entries = dis.Bytecode(code).exception_entries
    return any(entry.start <= offset <= entry.end for entry in entries)


def _is_conditional(name: str) -> bool:
    return "JUMP" in name and "_IF_" in name


@contextmanager
def distributions_unchecked() -> Iterator[None]:
    """Within, torch's distributions take their parameters as they are: checking asks for values."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
