"""Keep freed memory for the next item, instead of handing its pages back to the kernel.

An item's arrays are freed and asked for again some times a second; by default glibc unmaps
large ones each time, and the kernel then zeroes every page anew, a quarter of the time of a
sweep on a small network.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), and what they are set to: bytes kept at the top of the heap, bytes
# asked for at a time, and the size (glibc's largest) from which an array is mapped by itself.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
SETTINGS = {M_TRIM_THRESHOLD: 512 << 20, M_TOP_PAD: 64 << 20, M_MMAP_THRESHOLD: 32 << 20}


def keep_freed_memory() -> None:
    """Set this process's C allocator; nothing happens where it is not glibc's."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in SETTINGS.items():
            mallopt(parameter, value)
