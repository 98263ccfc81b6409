"""Observation and action spaces as Stable-Baselines3 writes them in JSON, read as text.

The library stores a space as a pickle and, beside it, its attributes as text. Only the text
is read: ``{"_shape": [4], "dtype": "float32", ...}`` for a Box, ``{"n": "2"}`` for a
Discrete, and for a Dict the printed form of its parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raypatch.errors import AgentError

MAX_VALUES = 1 << 28


@dataclass(frozen=True)
class Space:
    """A gymnasium space.

    ``kind`` is Box, Discrete, MultiDiscrete, MultiBinary or Dict; ``counts`` are the numbers
    of choices of a Discrete or MultiDiscrete; ``parts`` the spaces of a Dict, in its order.
    """

    kind: str
    shape: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    image: bool = False
    parts: Mapping[str, Space] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers an element is given by."""
        return sum(part.size for part in self.parts.values()) or math.prod(self.shape)


def read_space(entry: Any, origin: str) -> Space:
    """The space a JSON entry describes; raises AgentError where it does not say."""
    kind = ""
    if isinstance(entry, Mapping):
        found = re.search(r"\.spaces\.\w+\.(\w+)'", str(entry.get(":type:")))
        kind = found.group(1) if found else ""
    try:
        space = _READERS[kind](entry)
    except (KeyError, ValueError, TypeError):
        raise AgentError(f"{origin}: the space {kind or entry!r} cannot be read from it") from None
    if not 0 < space.size <= MAX_VALUES:
        raise AgentError(f"{origin}: a space of {space.size:,} values is not believable")
    return space


def _box(entry: Mapping[str, Any]) -> Space:
    shape = entry.get("_shape", entry.get("shape"))  # older gym's name
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(shape)
    bounds = [set(re.findall(r"-?\d+\.?\d*", str(entry[key]))) for key in ("low", "high")]
    whole = bounds == [{"0"}, {"255"}]
    return Space("Box", tuple(shape), image=_is_image(tuple(shape), str(entry["dtype"]), whole))


def _is_image(shape: tuple[int, ...], dtype: str, whole_range: bool) -> bool:
    """What the library itself takes for an image: it is scaled by 255."""
    return len(shape) == 3 and dtype == "uint8" and whole_range


def _multi_discrete(entry: Mapping[str, Any]) -> Space:
    counts = tuple(int(word) for word in re.findall(r"\d+", str(entry["nvec"])))
    return Space("MultiDiscrete", (len(counts),), counts)


def _multi_binary(entry: Mapping[str, Any]) -> Space:
    shape = tuple(int(word) for word in re.findall(r"\d+", str(entry["n"])))
    return Space("MultiBinary", shape)


_PART = re.compile(
    r"'(?P<key>[^']+)'[:,] (?:"
    r"Box\((?P<low>[^()]*?), (?P<high>[^()]*?), \((?P<shape>[\d, ]*)\), (?P<dtype>\w+)\)"
    r"|Discrete\((?P<n>\d+)(?:, start=\d+)?\)"
    r"|MultiDiscrete\(\[(?P<nvec>[\d ]+)\](?:, start=\[[\d ]+\])?\)"
    r"|MultiBinary\((?P<binary>[^()]*|\([\d, ]+\))\))"
)


def _dict(entry: Mapping[str, Any]) -> Space:
    text = str(entry["spaces"])
    parts = {found["key"]: _part(found) for found in _PART.finditer(text)}
    rest = re.sub(r"OrderedDict|[\s(){}\[\],]", "", _PART.sub("", text))
    if rest or not parts:
        raise ValueError(text)
    return Space("Dict", parts=parts)


def _part(found: re.Match[str]) -> Space:
    if found["n"]:
        return Space("Discrete", (1,), (int(found["n"]),))
    if found["nvec"]:
        return _multi_discrete({"nvec": found["nvec"]})
    if found["binary"]:
        return _multi_binary({"n": found["binary"]})
    shape = tuple(int(word) for word in re.findall(r"\d+", found["shape"]))
    whole = (found["low"], found["high"]) == ("0", "255")
    return Space("Box", shape, image=_is_image(shape, found["dtype"], whole))


_READERS = {
    "Box": _box,
    "Discrete": lambda entry: Space("Discrete", (1,), (int(entry["n"]),)),
    "MultiDiscrete": _multi_discrete,
    "MultiBinary": _multi_binary,
    "Dict": _dict,
}
