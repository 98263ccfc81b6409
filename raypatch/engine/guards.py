"""Guards: branches of a forward that only raise, as ``assert x.dim() == 2``. They do not decide
what a network computes, so that tracing can go on where they ask for what is not known yet.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributions import Distribution

# Between asking for a truth value and the jump that it decides.
ASKING = {"TO_BOOL", "COMPARE_OP", "CALL", "CALL_FUNCTION", "CACHE", "EXTENDED_ARG"}
# Where a branch that does not only raise ends.
ENDING = ("RETURN", "YIELD", "FOR_ITER", "RERAISE")


def truth_that_goes_on(frame: FrameType) -> bool | None:
    """Python asks for a truth value in ``frame``: with which one the code goes on, where the other
    one only leads to a ``raise``. None where neither does, or where the error is caught."""
    code = dis.Bytecode(frame.f_code)
    instructions = list(code)
    at = {instruction.offset: number for number, instruction in enumerate(instructions)}
    caught = [range(e.start, e.end + 1) for e in getattr(code, "exception_entries", ())]
    if any(instruction.opname == "SETUP_FINALLY" for instruction in instructions):
        caught.append(range(len(frame.f_code.co_code)))  # Python 3.10 has no table of them

    def raises(number: int) -> bool:
        for _ in instructions:
            instruction = instructions[number]
            name = instruction.opname
            if name == "RAISE_VARARGS":
                return not any(instruction.offset in offsets for offsets in caught)
            if name.startswith(ENDING) or _is_conditional(name):
                return False
            jumps = instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs
            number = at[instruction.argval] if jumps else number + 1
        return False

    # Of a call the last instruction may be what it keeps in the code after itself.
    number = max(n for offset, n in at.items() if offset <= frame.f_lasti)
    while instructions[number].opname in ASKING:
        number += 1
    jump = instructions[number]
    if not _is_conditional(jump.opname) or "NONE" in jump.opname:
        return None
    ways = {"IF_TRUE" in jump.opname: at[jump.argval], "IF_FALSE" in jump.opname: number + 1}
    fails = {truth: raises(way) for truth, way in ways.items()}
    return None if fails[True] == fails[False] else fails[False]


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
