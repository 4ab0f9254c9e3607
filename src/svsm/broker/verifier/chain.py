# SPDX-License-Identifier: MIT OR Apache-2.0
"""The certificate chain: from the key that signed a report up to a root that was pinned or named.

    ARK (self-signed) → ASK, or ASVK for a VLEK (path length 0) → VCEK or VLEK

Order matters. The root is chosen first, by fingerprint, before any certificate of the evidence is believed; only then
do signatures, names, constraints, the simulation mark and dates follow. Under a simulated root every certificate must
carry the mark, under a real one none may: so simulated evidence can never be presented as real, even to somebody who
accepts both.

Results of signature checks are cached by their exact inputs (key, message, signature), so a fleet's chains are paid
for once. Dates and roots are judged anew each time.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable, Sequence
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from svsm.broker.verifier.roots import AMD_FINGERPRINTS, Roots, amd_certificates, fingerprint
from svsm.formats.errors import FormatError, IntegrityError, PolicyError
from svsm.formats.snp.certs import (
    BASIC_CONSTRAINTS_OID,
    KEY_USAGE_OID,
    MARK_EXTENSION_OID,
    MARK_EXTENSION_VALUE,
    Certificate,
    RevocationList,
    VekExtensions,
    parse_crl,
    vek_extensions,
)
from svsm.formats.snp.tcb import Line

__all__ = [
    "Chain",
    "check_dates",
    "check_mark",
    "check_names",
    "check_revocation",
    "check_signatures",
    "find_chain",
    "load_vek_key",
]

_KEY_NAMES: Final = {"SEV-VCEK": "VCEK", "SEV-VLEK": "VLEK"}
_RSA_BITS: Final = 4096
_CACHED_BYTES: Final = 4096
_UNDERSTOOD_CRITICAL: Final = frozenset({BASIC_CONSTRAINTS_OID, KEY_USAGE_OID})


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """A chain whose root is accepted. Nothing else about it has been checked."""

    vek: Certificate
    intermediate: Certificate
    root: Certificate
    line: Line
    key: str
    """"VCEK" or "VLEK"."""
    simulated: bool

    @property
    def certificates(self) -> tuple[tuple[str, Certificate], ...]:
        """Each with the name that messages use."""
        return (self.key, self.vek), ("ASVK" if self.key == "VLEK" else "ASK", self.intermediate), ("ARK", self.root)

    def extensions(self) -> VekExtensions:
        """AMD's extensions of the signing key's certificate."""
        return vek_extensions(self.vek)


def find_chain(certificates: Sequence[Certificate], roots: Roots) -> Chain:
    """Choose signing key, intermediate and root among what came with the evidence and what is known.

    Args:
        certificates: The VCEK or VLEK and whatever came with it, in any order.
        roots: Whom to trust.

    Raises:
        FormatError: ``chain-incomplete``, ``chain-ambiguous``.
        IntegrityError: ``chain-issuer``.
        PolicyError: ``root-unknown``.
    """
    vek = _only((c for c in certificates if c.subject.common_name in _KEY_NAMES), "VCEK or VLEK")
    key = _KEY_NAMES[vek.subject.common_name]
    line = _line(vek, key)
    offered = [c for c in certificates if c.subject.common_name.startswith("ARK-")]
    root, simulated = _choose_root(vek, offered, line, roots)
    candidates = [c for c in (*certificates, *roots.known) if c.subject.raw == vek.issuer.raw]
    if not candidates and not simulated:
        shipped = amd_certificates(line)
        candidates = [c for c in shipped[1:] if c.subject.raw == vek.issuer.raw]
    intermediate = _only(candidates, "intermediate (ASK or ASVK)")
    return Chain(vek, intermediate, root, line, key, simulated)


def _line(vek: Certificate, key: str) -> Line:
    prefix = "SEV-VLEK-" if key == "VLEK" else "SEV-"
    name = vek.issuer.common_name
    for line in Line:
        if name == prefix + line.value:
            return line
    raise IntegrityError(
        f"a {key} is not issued by {name!r}", code="chain-issuer", section="AMD 57230 §3.1", expected=prefix + "<line>"
    )


def _choose_root(
    vek: Certificate, offered: Sequence[Certificate], line: Line, roots: Roots
) -> tuple[Certificate, bool]:
    if offered:
        root = _only(offered, "ARK")
        name = fingerprint(root)
        if name in roots.fingerprints:
            return root, True
        if line in roots.lines and name == AMD_FINGERPRINTS[line]:
            return root, False
        raise PolicyError(
            "the evidence's root is not an accepted one",
            code="root-unknown",
            hint="a simulated root is trusted only where its fingerprint is named",
            fingerprint=name.hex(),
        )
    # No root came along. The mark says which kind it must be: the other kind would refuse this certificate anyway.
    known = [c for c in roots.known if fingerprint(c) in roots.fingerprints and c.subject.common_name == f"ARK-{line}"]
    if vek.marked and known:
        return _only(known, "ARK"), True
    if not vek.marked and line in roots.lines:
        return amd_certificates(line)[0], False
    raise PolicyError("the evidence names no root, and none is accepted for it", code="root-unknown", line=str(line))


def _only(certificates: Iterable[Certificate], what: str) -> Certificate:
    found = {certificate.raw: certificate for certificate in certificates}
    if not found:
        raise FormatError(f"the evidence has no {what} certificate", code="chain-incomplete")
    if len(found) > 1:
        raise FormatError(f"the evidence has more than one {what} certificate", code="chain-ambiguous")
    return next(iter(found.values()))


def check_names(chain: Chain) -> str:
    """Names, constraints and unknown critical extensions.

    Raises:
        IntegrityError: ``chain-issuer``, ``chain-name``, ``chain-constraints`` or ``chain-extension``.
    """
    links = (
        (chain.vek, chain.intermediate),
        (chain.intermediate, chain.root),
        (chain.root, chain.root),
    )
    if any(certificate.issuer.raw != issuer.subject.raw for certificate, issuer in links):
        raise IntegrityError("the chain's names do not lead to its root", code="chain-issuer")
    if chain.root.subject.common_name != f"ARK-{chain.line}":
        raise IntegrityError("the root is another product's", code="chain-name", got=chain.root.subject.common_name)
    for label, certificate in chain.certificates:
        if not (certificate.subject.like_amd and certificate.issuer.like_amd):
            raise IntegrityError(f"the {label}'s names are not AMD's", code="chain-name")
        for oid, (critical, _) in certificate.extensions.items():
            if critical and oid not in _UNDERSTOOD_CRITICAL:
                raise IntegrityError(f"the {label} has an unknown critical extension", code="chain-extension", got=oid)
    is_authority, _ = chain.root.authority()
    constraints = (
        is_authority
        and chain.root.may_sign_certificates()
        and chain.intermediate.authority() == (True, 0)
        and chain.intermediate.may_sign_certificates()
        and not chain.vek.authority()[0]
    )
    if not constraints:
        raise IntegrityError("a certificate may not sign what it signed", code="chain-constraints")
    return f"{chain.key} ← {chain.intermediate.subject.common_name} ← {chain.root.subject.common_name}"


def check_mark(chain: Chain) -> str:
    """The simulation mark: on every certificate under a simulated root, on none under a real one.

    Raises:
        PolicyError: ``mark-missing`` or ``mark-forbidden``.
    """
    for label, certificate in chain.certificates:
        if not chain.simulated and certificate.marked:
            raise PolicyError(f"the {label} under a real root is marked as simulated", code="mark-forbidden")
        if chain.simulated and not _fully_marked(certificate, authority=label != chain.key):
            raise PolicyError(f"the {label} under a simulated root lacks the mark", code="mark-missing")
    return "simulated, and says so" if chain.simulated else "no simulation mark"


def _fully_marked(certificate: Certificate, *, authority: bool) -> bool:
    names = certificate.subject.marked and certificate.issuer.marked
    return names and (not authority or certificate.extensions.get(MARK_EXTENSION_OID) == (False, MARK_EXTENSION_VALUE))


def check_signatures(chain: Chain) -> str:
    """ARK signs itself and the intermediate, the intermediate signs the VCEK or VLEK.

    Raises:
        IntegrityError: ``chain-signature``; ``chain-key`` when a key is of another kind.
    """
    pairs = (
        ("ARK", chain.root, chain.root),
        ("ASK", chain.intermediate, chain.root),
        (chain.key, chain.vek, chain.intermediate),
    )
    for label, certificate, issuer in pairs:
        verified = _rsa_verified(issuer.public_key, certificate.tbs, certificate.signature)
        if verified is None:
            raise IntegrityError(f"the {label}'s issuer has no RSA-4096 key", code="chain-key")
        if not verified:
            raise IntegrityError(f"the {label} certificate's signature is wrong", code="chain-signature")
    load_vek_key(chain.vek.public_key)
    return "RSASSA-PSS with SHA-384"


def _rsa_verified(public_key: bytes, message: bytes, signature: bytes) -> bool | None:
    """Whether a signature holds; None when the key is not RSA-4096."""
    # What is larger than AMD's certificates is checked, but must not fill the cache.
    check = _cached_rsa_check if len(message) + len(signature) <= _CACHED_BYTES else _rsa_check
    return check(public_key, message, signature)


def _rsa_check(public_key: bytes, message: bytes, signature: bytes) -> bool | None:
    try:
        key = serialization.load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != _RSA_BITS:
        return None
    try:
        key.verify(signature, message, padding.PSS(padding.MGF1(hashes.SHA384()), 48), hashes.SHA384())
    except InvalidSignature:
        return False
    return True


_cached_rsa_check = functools.lru_cache(maxsize=2048)(_rsa_check)
"""By the exact inputs, so that nothing can stand in for something else."""


@functools.lru_cache(maxsize=4096)
def load_vek_key(public_key: bytes) -> ec.EllipticCurvePublicKey:
    """The P-384 key of a VCEK or VLEK.

    Raises:
        IntegrityError: ``chain-key`` when it is not one.
    """
    try:
        key = serialization.load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IntegrityError("the signing key is not a P-384 key", code="chain-key")
    return key


def check_dates(chain: Chain, at: datetime.datetime) -> str:
    """Every certificate is within its dates.

    Raises:
        PolicyError: ``chain-expired`` or ``chain-not-yet-valid``.
    """
    for label, certificate in chain.certificates:
        if at < certificate.not_before:
            raise PolicyError(
                f"the {label} is not valid yet",
                code="chain-not-yet-valid",
                not_before=certificate.not_before.isoformat(),
            )
        if at > certificate.not_after:
            raise PolicyError(
                f"the {label} has expired", code="chain-expired", not_after=certificate.not_after.isoformat()
            )
    return f"valid until {min(c.not_after for _, c in chain.certificates).isoformat()}"


def check_revocation(chain: Chain, crl: bytes | None, at: datetime.datetime) -> str | None:
    """The intermediate is not on the root's revocation list. None without a list.

    Raises:
        IntegrityError: ``crl-signature``.
        PolicyError: ``crl-expired`` or ``chain-revoked``.
        FormatError: When the list is malformed.
    """
    if crl is None:
        return None
    parsed: RevocationList = parse_crl(crl)
    signed = _rsa_verified(chain.root.public_key, parsed.tbs, parsed.signature)
    if parsed.issuer.raw != chain.root.subject.raw or not signed:
        raise IntegrityError("the revocation list is not the root's", code="crl-signature")
    if at < parsed.this_update or (parsed.next_update is not None and at > parsed.next_update):
        raise PolicyError("the revocation list is not of this time", code="crl-expired")
    for label, certificate in chain.certificates:
        if certificate.serial in parsed.revoked and certificate.issuer.raw == parsed.issuer.raw:
            raise PolicyError(f"the {label} is revoked", code="chain-revoked", serial=certificate.serial)
    return f"not on the list of {parsed.this_update.isoformat()}"
