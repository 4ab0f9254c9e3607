# SPDX-License-Identifier: MIT OR Apache-2.0
"""The error root. Re-exported from `svsm.formats.errors`, where it lives because `formats` imports nothing."""

from svsm.formats.errors import (
    BackendError,
    FormatError,
    IntegrityError,
    PolicyError,
    ProtocolError,
    StateError,
    SvsmError,
)

__all__ = [
    "BackendError",
    "FormatError",
    "IntegrityError",
    "PolicyError",
    "ProtocolError",
    "StateError",
    "SvsmError",
]
