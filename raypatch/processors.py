"""What this process may use of the machine's processors."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """At least one."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
