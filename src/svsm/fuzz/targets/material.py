# SPDX-License-Identifier: MIT OR Apache-2.0
"""Honest parties and their messages, which targets damage.

Elliptic-curve keys are fixed, so that a reproducer means the same tomorrow. RSA keys of the simulated authority are
drawn once per process (a fixed one would have to be shipped); nothing depends on their values, only on lengths.
"""

from __future__ import annotations

import datetime
import functools
import os

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.token import SigningKey
from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront
from svsm.formats.snp.tcb import Line
from svsm.hardware.authority import MODELS, Authority, Machine

__all__ = ["BORN", "CONFIGURATION", "broker_key", "chip_machine", "ephemeral", "open_descriptors"]

BORN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""When the simulated chip was made."""

CONFIGURATION = LaunchConfiguration(
    volume_id="00000000-1111-2222-3333-444444444444",
    name="vm",
    tpms=(TpmConfiguration("tpm0", TpmFront.SOCKET), TpmConfiguration("tpm1", TpmFront.SVSM)),
)


def ephemeral(number: int) -> EphemeralKey:
    """A fixed P-521 key."""
    return EphemeralKey(ec.derive_private_key(0xE000 + number, ec.SECP521R1()))


@functools.cache
def broker_key() -> SigningKey:
    """The fixed key that signs tokens."""
    return SigningKey(ec.derive_private_key(0xB001, ec.SECP384R1()))


@functools.cache
def chip_machine() -> Machine:
    """A simulated chip with its certificates."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=4096)
    authority = Authority.create(Line.MILAN, now=BORN, keys=(key, key))
    vcek_key = ec.derive_private_key(0xC41, ec.SECP384R1())
    chip_id, tcb = b"\x11" * 64, MODELS[Line.MILAN].tcb
    vcek = authority.issue_vcek(vcek_key.public_key(), chip_id=chip_id, tcb=tcb, now=BORN)
    der = Encoding.DER
    return Machine(
        line=Line.MILAN,
        chip_id=chip_id,
        tcb=tcb,
        vcek=vcek.public_bytes(der),
        ask=authority.ask.public_bytes(der),
        ark=authority.ark.public_bytes(der),
        key=vcek_key,
    )


def open_descriptors() -> set[str]:
    """Those of this process; the one that lists them is gone when the set is looked at."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
