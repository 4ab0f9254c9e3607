# SPDX-License-Identifier: MIT OR Apache-2.0
"""Envelopes of reports: each form is found by its bytes, everything else is refused."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.snp.certificate_table import ARK, ASK, VCEK, pack_table
from svsm.formats.snp.evidence import MAX_EVIDENCE_BYTES, Evidence, open_evidence

_REPORT = b"\x02" + bytes(1182) + b"\x07"
_HCL = b"HCLA" + bytes(28) + _REPORT + b"own data"
_TABLE = pack_table({VCEK: b"vcek", ASK: b"ask", ARK: b"ark"})


def _url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _std(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_each_form_is_found() -> None:
    chain = (b"ask", b"ark")
    pem = "-----BEGIN CERTIFICATE-----"
    assert open_evidence(_REPORT) == Evidence("report", _REPORT)
    assert open_evidence(_REPORT + _TABLE) == Evidence("report and table", _REPORT, b"vcek", chain)
    assert open_evidence(_HCL) == Evidence("hcl", _REPORT)
    for shown, expected in (
        ({"version": 1, "hcl_report": _url(_HCL), "vcek": _url(b"vcek?>")}, Evidence("json", _REPORT, b"vcek?>")),
        ({"report": list(_HCL), "vcek": pem}, Evidence("json", _REPORT, pem.encode())),
        ({"report": _std(_REPORT)}, Evidence("json", _REPORT)),
        ({"snp-report": _std(_REPORT), "certs-buf": _std(_TABLE)}, Evidence("json", _REPORT, b"vcek", chain)),
        ({"snp-report": _std(_REPORT), "certs-buf": None}, Evidence("json", _REPORT)),
    ):
        assert open_evidence(json.dumps(shown).encode()) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _REPORT[:-1],
        _HCL[: 0x20 + 1183],
        b"{",
        b"[]",
        b"{}",
        b'{"report": 5}',
        b'{"report": [256]}',
        b'{"report": "!"}',
        b'{"hcl_report": "", "vcek": {}}',
        b'{"snp-report": "", "certs-buf": 1}',
        b'{"a":' * 100_000,
        b"\x00" * (MAX_EVIDENCE_BYTES + 1),
        b"{\xff}",
    ],
    ids=range(14),
)
def test_everything_else_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as refused:
        open_evidence(data)
    assert refused.value.code == "evidence-format"


def test_a_bad_table_is_refused_as_one() -> None:
    with pytest.raises(FormatError) as refused:
        open_evidence(_REPORT + b"x")
    assert refused.value.code == "certificate-table-terminator"


@given(
    st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(lambda tail: b"HCLA" + tail),
        st.text().map(lambda t: b"{" + t.encode()),
    )
)
def test_any_bytes_are_evidence_or_refused(data: bytes) -> None:
    with pytest.raises(SvsmError):
        open_evidence(data)
