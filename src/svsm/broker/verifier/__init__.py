# SPDX-License-Identifier: MIT OR Apache-2.0
"""The verifier of attestation evidence: bytes in, a verdict with reasons out. Pure: no clock, no network, no files."""

from svsm.broker.verifier.policy import ReportPolicy
from svsm.broker.verifier.roots import Roots
from svsm.broker.verifier.verdict import Check, Result, Verdict
from svsm.broker.verifier.verify import CHECK_NAMES, verify, verify_evidence

__all__ = ["CHECK_NAMES", "Check", "ReportPolicy", "Result", "Roots", "Verdict", "verify", "verify_evidence"]
