# SPDX-License-Identifier: MIT OR Apache-2.0
"""TPM commands: pinned bytes (TCG part 3), and responses taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats import tpm
from svsm.formats.errors import SvsmError


def test_commands_are_the_bytes_of_the_specification() -> None:
    assert tpm.startup(tpm.SU_CLEAR).hex() == "80010000000c000001440000"
    assert tpm.shutdown(tpm.SU_STATE).hex() == "80010000000c000001450001"
    assert tpm.get_random(32).hex() == "80010000000c0000017b0020"
    assert tpm.get_capability(6, 0x100, 1).hex() == "8001000000160000017a000000060000010000000001"
    assert tpm.flush_context(0x80000000).hex() == "80010000000e0000016580000000"
    assert (
        tpm.dictionary_attack_parameters(max_tries=32, recovery_seconds=600, lockout_recovery_seconds=86400).hex()
        == "8002000000270000013a4000000a00000009400000090000000000000000200000025800015180"
    )
    assert tpm.failure_response().hex() == "80010000000a00000101"


def test_the_ek_template_is_the_one_of_the_credential_profile() -> None:
    command = tpm.create_ek()
    assert int.from_bytes(command[2:6], "big") == len(command)
    public = command[-(2 + 4 + 314) :][:314]
    assert public.hex().startswith(
        "0001000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
    )
    assert public[42:56].hex() == "0006008000430010080000000000"


def test_command_codes_and_response_codes() -> None:
    assert tpm.command_code(tpm.get_random(1)) == 0x17B
    assert tpm.command_code(b"short") is None
    assert tpm.response_code(tpm.failure_response(0x922)) == 0x922


def test_a_capability_response_is_taken_apart() -> None:
    body = b"\x01" + bytes.fromhex("00000006000000020000020e000000030000020f00000020")
    response = tpm.ResponseHeader(0x8001, 10 + len(body), 0).pack() + body
    assert tpm.parse_properties(response) == {0x20E: 3, 0x20F: 32}
    for cut in range(len(response)):
        with pytest.raises(SvsmError):
            tpm.parse_properties(response[:cut])
    with pytest.raises(SvsmError):
        tpm.parse_properties(tpm.failure_response())


@given(st.binary(max_size=100))
def test_any_response_is_a_value_or_a_svsm_error(data: bytes) -> None:
    for parse in (tpm.parse_properties, tpm.parse_create_primary, tpm.response_code):
        try:
            parse(tpm.ResponseHeader(0x8001, 10 + len(data), 0).pack() + data)
            parse(data)
        except SvsmError:
            continue
