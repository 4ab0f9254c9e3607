# SPDX-License-Identifier: MIT OR Apache-2.0
"""The console: one JSON event per line, for the host and so for everybody. Nothing secret is ever an event.

A host that does not read its console must not stop the kernel: lines that do not fit into the pipe are dropped.
"""

from __future__ import annotations

import json
import os

from svsm.abi.errors import SvsmError

__all__ = ["Console"]

_MAX_LINE_BYTES = 4096
"""At most PIPE_BUF, so that lines of several writers never mix."""


class Console:
    """Writes events to a descriptor; None swallows them."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    def event(self, name: str, /, **members: object) -> None:
        """One event."""
        if self._descriptor is None:
            return
        line = json.dumps({"event": name, **members}, separators=(",", ":")).encode() + b"\n"
        if len(line) <= _MAX_LINE_BYTES:
            try:
                os.write(self._descriptor, line)
            except OSError:
                return

    def failure(self, error: SvsmError) -> None:
        """The event of an error that ends the kernel."""
        reason = error.details.get("reason")
        self.event(
            "failed",
            code=error.code,
            message=error.message,
            hint=error.hint,
            exit_code=error.exit_code,
            reason=reason if isinstance(reason, str) else None,
        )
