# SPDX-License-Identifier: MIT OR Apache-2.0
"""The TPM state file: every truncation and every flipped bit is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import IntegrityError, SvsmError
from svsm.formats.tpm_envelope import MAX_STATE_BYTES, TpmEnvelope

NAME = b"\x00\x0b" + bytes(range(32))


@pytest.mark.parametrize("name", [None, NAME])
def test_it_round_trips(name: bytes | None) -> None:
    envelope = TpmEnvelope(b"state" * 100, 77, name)
    assert TpmEnvelope.parse(envelope.pack()) == envelope
    assert TpmEnvelope.parse(envelope.pack()).pack() == envelope.pack()


def test_the_layout_is_pinned() -> None:
    packed = TpmEnvelope(b"\xaa", 0x0102, NAME).pack()
    expected = b"SVSM-TPM" + b"\1\0" + b"\0\0" + b"\1\0\0\0" + b"\2\1" + bytes(6) + NAME + bytes(2)
    assert packed[:60] == expected
    assert packed[64:] == b"\xaa"


def test_every_truncation_is_refused() -> None:
    packed = TpmEnvelope(b"state", 1, NAME).pack()
    for cut in range(len(packed)):
        with pytest.raises(SvsmError):
            TpmEnvelope.parse(packed[:cut])
    with pytest.raises(SvsmError):
        TpmEnvelope.parse(packed + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    packed = TpmEnvelope(b"state", 1, NAME).pack()
    for offset in range(len(packed)):
        for bit in range(8):
            damaged = bytearray(packed)
            damaged[offset] ^= 1 << bit
            with pytest.raises(SvsmError):
                TpmEnvelope.parse(damaged)


def test_a_damaged_state_is_an_integrity_error_and_another_version_is_named() -> None:
    packed = bytearray(TpmEnvelope(b"state", 1, NAME).pack())
    packed[-1] ^= 1
    with pytest.raises(IntegrityError) as caught:
        TpmEnvelope.parse(packed)
    assert caught.value.code == "tpm-envelope-checksum"
    packed[8] = 2
    with pytest.raises(SvsmError) as version:
        TpmEnvelope.parse(packed)
    assert version.value.code == "tpm-envelope-version"


@pytest.mark.parametrize("size", [0, MAX_STATE_BYTES + 1])
def test_impossible_sizes_are_not_packed(size: int) -> None:
    with pytest.raises(SvsmError):
        TpmEnvelope(bytes(size), 0, None).pack()


def test_the_state_is_not_shown() -> None:
    assert "secret" not in repr(TpmEnvelope(b"secret", 0, None))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_envelope_or_a_svsm_error(data: bytes) -> None:
    with pytest.raises(SvsmError):
        TpmEnvelope.parse(data)
