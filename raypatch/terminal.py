"""Where tables and facts are printed."""

from __future__ import annotations

import sys
from typing import Any

PIPE_WIDTH = 240


def console() -> Any:
    """On a terminal as wide as that is. Elsewhere nothing is gained by folding: a program may read
    it."""
    from rich.console import Console

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, width=None if is_terminal else PIPE_WIDTH)
