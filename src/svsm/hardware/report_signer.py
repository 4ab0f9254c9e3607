# SPDX-License-Identifier: MIT OR Apache-2.0
"""The chip's signature on a report: ECDSA P-384 with SHA-384 over the first 0x2A0 bytes, R and S little-endian."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from svsm.formats.snp.report import Report

__all__ = ["sign_report"]


def sign_report(key: ec.EllipticCurvePrivateKey, report: Report) -> bytes:
    """Sign exactly what the report says.

    Args:
        key: A P-384 key, the VCEK's.
        report: Whatever stands in its signature is replaced.

    Returns:
        1184 bytes.
    """
    signature = key.sign(report.signed_part, ec.ECDSA(hashes.SHA384()))
    return report.with_signature(*utils.decode_dss_signature(signature)).pack()
