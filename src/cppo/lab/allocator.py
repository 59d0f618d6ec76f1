"""How the C library keeps a process's memory."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20


def keep_freed_memory() -> None:
    """Let the GNU C library keep what is freed, up to 1 GiB, for the next allocation; elsewhere nothing is done.

    A training step frees blocks of some MiB and asks for them again. By default they go back to the kernel in between,
    whose zeroing and mapping of fresh pages took a quarter of a run's CPU time with a vocabulary of 1,034. Only where
    memory lies changes, no number.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl's
        return
    # Any of the three also stops the library from moving the threshold for mapped blocks, 32 MiB at most.
    for option, size in ((_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 1024 * _MIB), (_TOP_PAD, 64 * _MIB)):
        mallopt(option, size)
