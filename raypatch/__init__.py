"""Which neurons of a trained RL agent cause its actions: activation patching at scale.

Importing this package loads neither torch nor ray; the names below load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypatch.agents import load_agent
    from raypatch.engine.patcher import Patcher, patch
    from raypatch.results.reader import open_results
    from raypatch.sweeps.driver import run

__version__ = "0.1.0"
__all__ = ["Patcher", "__version__", "load_agent", "open_results", "patch", "run"]

_HOMES = {
    "load_agent": "raypatch.agents",
    "run": "raypatch.sweeps.driver",
    "Patcher": "raypatch.engine.patcher",
    "patch": "raypatch.engine.patcher",
    "open_results": "raypatch.results.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raypatch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
