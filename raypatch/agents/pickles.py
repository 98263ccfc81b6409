"""Read the names inside a pickle without unpickling it."""

from __future__ import annotations

import base64
import pickletools

from raypatch.errors import AgentError


def pickled_class(serialized: str, origin: str) -> tuple[str, str]:
    """Module and name of the class that a base64 pickle of just a class refers to.

    The opcodes are read, never executed.
    """
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(base64.b64decode(serialized)):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                return module, name
            if opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                return texts[-2], texts[-1]
            if "UNICODE" in opcode.name:
                texts.append(str(argument))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise AgentError(f"{origin}: unreadable class name ({error})") from None
    raise AgentError(f"{origin}: names no class")
