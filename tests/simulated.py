# SPDX-License-Identifier: MIT OR Apache-2.0
"""Simulated machines for tests, without the seconds that minting RSA-4096 keys takes.

The authority's keys are throw-away keys in tests/keys, made for this project; chip keys are made anew in each run.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from svsm.formats.snp.tcb import Line
from svsm.hardware.authority import Authority, Machine

__all__ = ["NOW", "authority", "authority_keys", "machine"]

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
"""The time that these tests live in."""

_KEYS = Path(__file__).resolve().parent / "keys"


@functools.cache
def authority_keys() -> tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey]:
    """Keys of (ARK, ASK), for `svsm.hardware.machine_store.mint` too."""
    return _key("ark"), _key("ask")


def _key(name: str) -> rsa.RSAPrivateKey:
    key = load_pem_private_key((_KEYS / f"throwaway-{name}.key.pem").read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


@functools.cache
def authority(line: Line = Line.MILAN) -> Authority:
    """A simulated authority that began at `NOW`."""
    return Authority.create(line, now=NOW, keys=authority_keys())


@functools.cache
def machine(line: Line = Line.MILAN) -> Machine:
    """A simulated machine of that authority; the same one in the whole run."""
    return Machine.create(authority(line), now=NOW)
