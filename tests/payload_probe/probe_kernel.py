# SPDX-License-Identifier: MIT OR Apache-2.0
"""A kernel-like entry: uses cryptography, then does what the test says."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import socket
import threading
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from svsm.confine import libc
from svsm.confine.context import ProcessContext
from tests.payload_probe import probe_loop

MARKER = "as built"


def main(context: ProcessContext) -> int:
    """Serve the descriptor named `control`."""
    key = ec.generate_private_key(ec.SECP521R1())
    AESGCM(bytes(32)).encrypt(bytes(12), b"works", None)
    names: dict[str, Any] = {
        "MARKER": MARKER,
        "context": context,
        "ctypes": ctypes,
        "dataclasses": dataclasses,
        "hashlib": hashlib,
        "key": key,
        "libc": libc,
        "os": os,
        "origins": probe_loop.origins,
        "socket": socket,
        "threading": threading,
    }
    return probe_loop.serve(context.descriptors["control"], names)
