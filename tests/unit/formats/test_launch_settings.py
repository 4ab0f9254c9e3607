# SPDX-License-Identifier: MIT OR Apache-2.0
"""The owner's settings page and the launch configuration: strict, canonical, bounded."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.launch_configuration import (
    MAX_AREA_BYTES,
    LaunchConfiguration,
    TpmConfiguration,
    TpmFront,
    pack_area,
    parse_area,
)
from svsm.formats.settings import SETTINGS_BYTES, Settings, SettingsHeader

UUID = "11111111-2222-3333-4444-555555555555"
CONFIGURATION = LaunchConfiguration(
    volume_id=UUID,
    name="vm",
    tpms=(TpmConfiguration("tpm0", TpmFront.SOCKET), TpmConfiguration("tpm1", TpmFront.SVSM)),
)


def test_the_settings_page_round_trips() -> None:
    page = Settings(broker_public_key=b"k" * 120).pack()
    assert len(page) == SETTINGS_BYTES
    assert Settings.parse(page) == Settings(broker_public_key=b"k" * 120)
    assert Settings.parse(page).pack() == page


def test_every_byte_of_the_page_counts() -> None:
    page = Settings(broker_public_key=b"k" * 120).pack()
    for place in range(SETTINGS_BYTES):
        changed = bytearray(page)
        changed[place] ^= 0x10
        if SettingsHeader.SIZE <= place < SettingsHeader.SIZE + 120:
            assert Settings.parse(changed).broker_public_key != b"k" * 120
            continue
        with pytest.raises(FormatError):
            Settings.parse(changed)


def test_truncated_pages_and_keys_that_do_not_fit() -> None:
    page = Settings(broker_public_key=b"k").pack()
    for length in (0, 31, 32, 4095):
        with pytest.raises(FormatError):
            Settings.parse(page[:length])
    with pytest.raises(FormatError):
        Settings.parse(page + b"\0")
    for bad in (b"", b"k" * 513):
        with pytest.raises(FormatError) as caught:
            Settings(broker_public_key=bad).pack()
        assert caught.value.code == "settings-key"


def test_the_configurations_bytes_and_hash() -> None:
    data = CONFIGURATION.to_json()
    assert data == (
        b'{"name":"vm","tpms":[{"front":"socket","name":"tpm0"},{"front":"svsm","name":"tpm1"}],'
        b'"version":1,"volume_id":"11111111-2222-3333-4444-555555555555"}'
    )
    assert LaunchConfiguration.parse(data) == CONFIGURATION
    assert CONFIGURATION.host_data() == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version":1', b'"version":2'),
        (b'"version":1', b'"version": 1'),
        (b'"name":"vm"', b'"name":"v\\u006d"'),
        (b'"name":"vm"', b'"name":"../vm"'),
        (b'"name":"vm"', b'"name":""'),
        (b'"name":"vm"', b'"extra":1,"name":"vm"'),
        (b'"socket"', b'"both"'),
        (b'"socket"', b'"svsm"'),
        (b'"tpm1"', b'"tpm0"'),
        (b"1111-2222", b"1111_2222"),
        (b"11111111-", b"1111111A-"),
        (b'"tpms":[', b'"tpms":[[],'),
    ],
)
def test_other_spellings_and_nonsense(old: bytes, new: bytes) -> None:
    data = CONFIGURATION.to_json().replace(old, new)
    with pytest.raises(FormatError):
        LaunchConfiguration.parse(data)


def test_too_many_tpms() -> None:
    tpms = tuple(TpmConfiguration(f"t{number}", TpmFront.SOCKET) for number in range(17))
    with pytest.raises(FormatError):
        LaunchConfiguration(volume_id=UUID, name="vm", tpms=tpms)


@given(st.binary(max_size=80))
def test_any_bytes_are_refused(data: bytes) -> None:
    with contextlib.suppress(SvsmError):
        LaunchConfiguration.parse(data)
    with contextlib.suppress(SvsmError):
        Settings.parse(data)
    with contextlib.suppress(SvsmError):
        parse_area(data)


def test_the_area_holds_exactly_the_configuration() -> None:
    data = CONFIGURATION.to_json()
    area = pack_area(data)
    assert len(area) == MAX_AREA_BYTES
    assert parse_area(area) == data
    for bad in (area[:-1] + b"x", b"\xff" * 4 + area[4:], b"\0\0\0", area + b"\0", (0).to_bytes(4, "little") + b"x"):
        with pytest.raises(FormatError) as caught:
            parse_area(bad)
        assert caught.value.code == "launch-configuration-area"
    with pytest.raises(FormatError):
        pack_area(bytes(MAX_AREA_BYTES))
