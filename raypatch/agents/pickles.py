"""Read the names inside a pickle without unpickling it."""

from __future__ import annotations

import base64
import binascii
import io
import pickletools
import zipfile
from collections.abc import Iterator

from raypatch.agents.archives import check_archive, is_archive
from raypatch.errors import AgentError

# What a saved tensor needs, and nothing that does anything else.
TENSOR_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
}
PICKLE_DAMAGE = (ValueError, IndexError, UnicodeDecodeError, KeyError, OverflowError, EOFError)


def pickled_class(serialized: str, origin: str) -> tuple[str, str]:
    """Module and name of the class that a base64 pickle of just a class refers to.

    The opcodes are read, never executed.
    """
    try:
        found = next(iter(global_names(base64.b64decode(serialized))), None)
    except (*PICKLE_DAMAGE, binascii.Error) as error:
        raise AgentError(f"{origin}: unreadable class name ({error})") from None
    if found is None:
        raise AgentError(f"{origin}: names no class")
    return found


def global_names(content: bytes) -> Iterator[tuple[str, str]]:
    """Module and name of everything a pickle would import, in order.

    A name that is not written out just before it is used comes as ``("?", "?")``.
    """
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            yield (texts[-2], texts[-1]) if len(texts) >= 2 else ("?", "?")
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            yield "?", "?"
        elif "UNICODE" in opcode.name or opcode.name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            texts.append(str(argument))
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append("?")  # a name taken from the memo is not one we can vouch for


def refuse_code(content: bytes, origin: str) -> None:
    """Raises AgentError unless the bytes are tensors, text or numbers: nothing that could run.

    Looks at bare pickles and at those inside a torch archive.
    """
    stream = io.BytesIO(content)
    if is_archive(stream):
        for name in check_archive(stream, origin):
            with zipfile.ZipFile(stream) as archive:
                inner = archive.read(name)
            refuse_code(inner, f"{origin}: {name}")
        return
    try:
        names = list(global_names(content))
    except PICKLE_DAMAGE:
        return  # no pickle: raw numbers or JSON, which nothing unpickles
    for module, name in names:
        storage = module == "torch" and name.endswith("Storage")
        if (module, name) not in TENSOR_GLOBALS and not storage:
            raise AgentError(
                f"{origin}: would import {module}.{name}, which is no tensor's; refused, since "
                "loading it could run code"
            )
