# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whether somebody listens on a Unix socket, without connecting to it.

The socket's file is there a moment before its program listens, and refuses connections then; a probing connection
would be taken for the client by programs that serve only one.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["listens"]

_ACCEPTS_CONNECTIONS = 1 << 16
"""__SO_ACCEPTCON in the flags column of /proc/net/unix."""


def listens(path: Path) -> bool:
    """Whether a socket at `path` accepts connections."""
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        _, _, _, flags, _, _, _, *names = line.split(maxsplit=7)
        if names == [str(path)] and int(flags, 16) & _ACCEPTS_CONNECTIONS:
            return True
    return False
