# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sealing a file of memory: from then on nobody can change it, whoever holds a descriptor.

Linux refuses F_SEAL_WRITE with EBUSY while something else refers to a page of the file. That can be the system itself,
which takes pages in hand for a moment when it compacts or reclaims memory; it waits for that, but for 150 ms only, and
on a loaded machine the moment is longer. So a refusal is tried again, a bounded number of times.
"""

from __future__ import annotations

import errno
import fcntl

__all__ = ["ALL_SEALS", "seal"]

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_TRIES = 16


def seal(descriptor: int) -> None:
    """Put all seals on a memfd; takes up to three seconds.

    Raises:
        OSError: The system does not do it. EBUSY: it is still mapped writable, or its pages are still held.
    """
    for left in reversed(range(_TRIES)):
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not left:
                raise
