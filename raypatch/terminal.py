"""Where tables and facts are printed."""

from __future__ import annotations

import sys
from typing import Any

PIPE_WIDTH = 240


def console() -> Any:
    """On a terminal as wide as that is. Elsewhere nothing is gained by folding: a program may read
    it."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
