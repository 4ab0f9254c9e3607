# SPDX-License-Identifier: MIT OR Apache-2.0
"""The envelopes in which people meet an attestation report, opened into report and certificates.

    the report itself         1184 bytes
    report ‖ table            the report and the certificate table that the host attached to it
    HCL blob                  Azure's paravisor: "HCLA", the report at 0x20, its own data after it
    JSON                      Azure's vTPM evidence, both forms (`hcl_report` and `vcek` in base64url; `report` as a
                              list of numbers and `vcek` in PEM); COCONUT's `snp-report` and `certs-buf` in base64

Which envelope it is follows from the bytes alone. Nothing here is trusted or verified, and no certificate is parsed.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from typing import Final

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.snp import certificate_table
from svsm.formats.snp.report import REPORT_BYTES

__all__ = ["MAX_EVIDENCE_BYTES", "Evidence", "open_evidence"]

MAX_EVIDENCE_BYTES: Final = 1 << 20
_HCL_MAGIC: Final = b"HCLA"
_HCL_HEADER_BYTES: Final = 0x20


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """A report and the certificates that came with it."""

    form: str
    """"report", "report and table", "hcl" or "json"."""
    report: bytes
    vek: bytes | None = None
    """The VCEK or VLEK, DER or PEM."""
    chain: tuple[bytes, ...] = ()
    """Further certificates."""


def open_evidence(data: Buffer) -> Evidence:
    """Find report and certificates in a file.

    Args:
        data: At most 1 MiB.

    Raises:
        FormatError: ``evidence-format``, or what the certificate table's parser raises.
    """
    raw = bytes(data)
    if len(raw) > MAX_EVIDENCE_BYTES:
        raise _unknown("the evidence is too large")
    if raw[:4] == _HCL_MAGIC:
        return Evidence("hcl", _from_hcl(raw))
    if raw.lstrip()[:1] == b"{":
        return _from_json(raw)
    if len(raw) < REPORT_BYTES:
        raise _unknown("too short for a report")
    cursor = Cursor(raw, what="evidence")
    report = cursor.take(REPORT_BYTES)
    if not cursor.remaining:
        return Evidence("report", report)
    return Evidence("report and table", report, *_from_table(cursor.rest()))


def _from_hcl(raw: bytes) -> bytes:
    if len(raw) < _HCL_HEADER_BYTES + REPORT_BYTES:
        raise _unknown("the HCL blob is cut short")
    cursor = Cursor(raw, what="HCL blob")
    cursor.take(_HCL_HEADER_BYTES)
    return cursor.take(REPORT_BYTES)


def _from_table(table: bytes) -> tuple[bytes | None, tuple[bytes, ...]]:
    entries = certificate_table.parse_table(table)
    vek = entries.get(certificate_table.VCEK, entries.get(certificate_table.VLEK))
    chain = tuple(entries[guid] for guid in (certificate_table.ASK, certificate_table.ARK) if guid in entries)
    return vek, chain


def _from_json(raw: bytes) -> Evidence:
    try:
        evidence = json.loads(raw)
    except (ValueError, RecursionError):
        raise _unknown("the evidence is not JSON") from None
    if not isinstance(evidence, dict):
        raise _unknown("the evidence is not a JSON object")
    if "snp-report" in evidence:
        table = evidence.get("certs-buf")
        found = (None, ()) if table is None else _from_table(_bytes_of(table))
        return Evidence("json", _bytes_of(evidence["snp-report"]), *found)
    blob = _bytes_of(evidence.get("hcl_report", evidence.get("report")))
    vek = evidence.get("vcek")
    pem = isinstance(vek, str) and vek.startswith("-----BEGIN")
    certificate = None if vek is None else vek.encode() if pem else _bytes_of(vek)
    report = _from_hcl(blob) if blob[:4] == _HCL_MAGIC else blob
    return Evidence("json", report, certificate)


def _bytes_of(value: object) -> bytes:
    """Bytes from base64 (either alphabet, padded or not) or from a list of numbers."""
    if isinstance(value, list) and all(isinstance(item, int) and 0 <= item <= 255 for item in value):
        return bytes(value)
    if isinstance(value, str):
        text = value.replace("-", "+").replace("_", "/").rstrip("=")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            pass
    raise _unknown("a member of the evidence is not bytes")


def _unknown(message: str) -> FormatError:
    return FormatError(
        message, code="evidence-format", hint="give the report's 1184 bytes, and its certificate by --vcek"
    )
