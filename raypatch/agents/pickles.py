"""The name of a pickled class, read without unpickling it."""

from __future__ import annotations

import base64
import binascii
import pickletools

from raypatch.errors import AgentError

DAMAGE = (
    ValueError, IndexError, UnicodeDecodeError, KeyError, OverflowError, EOFError, binascii.Error,
)  # fmt: skip


def pickled_class(serialized: str, origin: str) -> tuple[str, str]:
    """Module and name of the class that a base64 pickle of just a class refers to.

    The opcodes are read, never executed.
    """
    try:
        found = _first_global(base64.b64decode(serialized))
    except DAMAGE as error:
        raise AgentError(f"{origin}: unreadable class name ({error})") from None
    if found is None:
        raise AgentError(f"{origin}: names no class")
    return found


def _first_global(content: bytes) -> tuple[str, str] | None:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            return module, name
        if opcode.name == "STACK_GLOBAL":
            return (texts[-2], texts[-1]) if len(texts) >= 2 else None
        if "UNICODE" in opcode.name:
            texts.append(str(argument))
    return None
