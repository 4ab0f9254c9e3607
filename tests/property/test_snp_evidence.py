# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whatever an attacker sends as evidence, the verifier answers with a verdict, and accepts nothing but the genuine."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.broker.verifier import Roots, Verdict, verify, verify_evidence
from svsm.formats.snp.report import SIGNED_BYTES
from tests.simulated import NOW, machine

_ROOTS = Roots.simulated(machine().ark) | Roots.amd()
_REPORT = machine().sign_report(machine().new_report(5))
_TABLE = machine().certificates()


def _evidence(report: bytes, table: bytes) -> Verdict:
    return verify_evidence(
        report,
        table,
        accepted_root=_ROOTS,
        expected_report_data=bytes(64),
        allowed_measurements=[bytes(48)],
        expected_host_data=bytes(32),
        at=NOW,
    )


def test_the_genuine_is_accepted() -> None:
    assert _evidence(_REPORT, _TABLE).accepted


@given(st.binary(max_size=1300), st.binary(max_size=300))
def test_any_bytes_are_refused(report: bytes, certificates: bytes) -> None:
    assert not verify(report, certificates, roots=_ROOTS, at=NOW).accepted
    assert not _evidence(report, certificates).accepted
    assert not _evidence(_REPORT, certificates).accepted


@settings(max_examples=200)
@given(
    st.integers(0, len(_REPORT) - 1),
    st.integers(1, 255),
    st.integers(0, len(_TABLE) - 1),
    st.integers(0, 255),
    st.booleans(),
)
def test_changed_evidence_is_refused_or_means_the_same(
    place: int, change: int, table_place: int, table_change: int, cut: bool
) -> None:
    report = bytearray(_REPORT)
    report[place] ^= change
    table = bytearray(_TABLE)
    table[table_place] ^= table_change
    verdict = _evidence(bytes(report), bytes(table[:table_place] if cut else table))
    # Any changed byte of a report breaks its form or its signature.
    assert not verdict.accepted
    assert not (verdict.authentic and place < SIGNED_BYTES)


@settings(max_examples=200)
@given(st.integers(0, len(_TABLE) - 1), st.integers(1, 255))
def test_a_changed_table_never_makes_another_key_count(place: int, change: int) -> None:
    table = bytearray(_TABLE)
    table[place] ^= change
    verdict = _evidence(_REPORT, bytes(table))
    if verdict.accepted:
        # Only a GUID that hides a certificate which is known anyway may change unnoticed.
        assert verdict.root_fingerprint == machine().root_fingerprint
        assert place < 4 * 24
