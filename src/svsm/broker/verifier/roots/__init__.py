# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whom to trust: AMD's root keys, pinned by fingerprint, and simulated roots that somebody named.

A root is never believed because it came with the evidence: anyone can make a chain with AMD's names on it. AMD's ARK,
ASK and ASVK ship with the package and are checked against the pinned fingerprints when they are read. A simulated root
is trusted only where its fingerprint was given, volume by volume, since whoever holds its key can sign any report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import re
from typing import Final

from svsm.formats.errors import IntegrityError, StateError
from svsm.formats.snp.certs import Certificate, certificates_from
from svsm.formats.snp.tcb import Line

__all__ = ["AMD_FINGERPRINTS", "Roots", "amd_certificates", "fingerprint"]

AMD_FINGERPRINTS: Final[dict[Line, bytes]] = {
    Line.MILAN: bytes.fromhex("69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
    Line.GENOA: bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
    Line.TURIN: bytes.fromhex("1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"),
}
"""SHA-256 of each ARK in DER."""

_ROW = re.compile(r"amd(?::(?P<line>[A-Za-z]+))?|simulated:(?P<fingerprint>[0-9a-fA-F]{64})")


def fingerprint(certificate: Certificate) -> bytes:
    """SHA-256 over the DER bytes: what a root is named by. 32 bytes."""
    return hashlib.sha256(certificate.raw).digest()


@functools.cache
def amd_certificates(line: Line) -> tuple[Certificate, Certificate, Certificate]:
    """AMD's (ARK, ASK, ASVK) of a product line, as shipped.

    Raises:
        IntegrityError: ``root-shipped`` when the package data is not what is pinned.
    """
    data = importlib.resources.files(__name__).joinpath(f"{line.value.lower()}.pem").read_bytes()
    by_name = {certificate.subject.common_name: certificate for certificate in certificates_from(data)}
    names = (f"ARK-{line}", f"SEV-{line}", f"SEV-VLEK-{line}")
    found = tuple(by_name[name] for name in names if name in by_name)
    if len(found) != 3 or fingerprint(found[0]) != AMD_FINGERPRINTS[line]:
        raise IntegrityError("the shipped root certificates are damaged", code="root-shipped", line=str(line))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Roots:
    """The accepted roots. Make one with `amd`, `simulated` or `parse`; an empty one accepts nothing."""

    lines: frozenset[Line] = frozenset()
    """AMD product lines whose real root is accepted."""
    fingerprints: frozenset[bytes] = frozenset()
    """Simulated roots that are accepted: SHA-256 of the certificate, 32 bytes each."""
    known: tuple[Certificate, ...] = ()
    """Certificates of simulated roots and intermediates that need not come with the evidence."""

    @classmethod
    def amd(cls, *lines: Line) -> Roots:
        """AMD's real roots: of these lines, or of all that are pinned."""
        return cls(lines=frozenset(lines or AMD_FINGERPRINTS))

    @classmethod
    def simulated(cls, *named: bytes) -> Roots:
        """Simulated roots, each by fingerprint (32 bytes) or by its certificate (DER or PEM, intermediates welcome).

        Raises:
            StateError: ``root-name`` when a file holds no root.
            FormatError: When it is not a certificate.
        """
        fingerprints: set[bytes] = set()
        known: list[Certificate] = []
        for name in named:
            if len(name) == 32:
                fingerprints.add(bytes(name))
                continue
            found = certificates_from(name)
            roots = [certificate for certificate in found if certificate.subject.common_name.startswith("ARK-")]
            if not roots:
                raise StateError("the file holds no root certificate (ARK)", code="root-name")
            fingerprints.update(map(fingerprint, roots))
            known += found
        return cls(fingerprints=frozenset(fingerprints), known=tuple(known))

    @classmethod
    def parse(cls, text: str) -> Roots:
        """A root as a volume's row names it: ``amd``, ``amd:Milan``, or ``simulated:`` and 64 hex digits.

        Raises:
            StateError: ``root-name`` for anything else.
        """
        match = _ROW.fullmatch(text)
        if match is None or (match["line"] and match["line"].title() not in set(Line)):
            raise StateError(
                "not the name of a root",
                code="root-name",
                hint="write amd, amd:Milan, amd:Genoa, amd:Turin, or simulated:FINGERPRINT",
                got=text[:80],
            )
        if match["fingerprint"]:
            return cls.simulated(bytes.fromhex(match["fingerprint"]))
        return cls.amd(Line(match["line"].title())) if match["line"] else cls.amd()

    def __or__(self, other: Roots) -> Roots:
        return Roots(self.lines | other.lines, self.fingerprints | other.fingerprints, self.known + other.known)
