# SPDX-License-Identifier: MIT OR Apache-2.0
"""The simulated machine: minted once, kept private, loaded whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from svsm.broker.verifier import Roots, verify
from svsm.formats.errors import BackendError, StateError
from svsm.formats.snp import certificate_table
from svsm.formats.snp.certs import parse_certificate
from svsm.formats.snp.report import Report, parse_report
from svsm.formats.snp.tcb import Line
from svsm.hardware.authority import Authority, Machine
from svsm.hardware.machine_store import load_machine, mint
from tests.simulated import NOW, authority, authority_keys, machine


def _mint(directory: Path, product: Line = Line.MILAN, *, force: bool = False) -> Machine:
    return mint(directory, product=product, force=force, now=NOW, authority_keys=authority_keys())


@pytest.mark.parametrize("line", list(Line))
def test_a_minted_machine_is_loaded_as_it_was(tmp_path: Path, line: Line) -> None:
    made = _mint(tmp_path / "state" / "machine", line)
    loaded = load_machine(tmp_path / "state" / "machine")
    assert (loaded.line, loaded.chip_id, loaded.tcb) == (line, made.chip_id, made.tcb)
    assert (loaded.vcek, loaded.ask, loaded.ark) == (made.vcek, made.ask, made.ark)
    assert loaded.root_fingerprint == hashlib.sha256(loaded.ark).digest()
    signed = loaded.sign_report(loaded.new_report(5))
    verdict = verify(signed, made.vcek, chain=[made.ask], roots=Roots.simulated(made.ark), at=NOW)
    assert verdict.accepted, verdict.detail


def test_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        _mint(tmp_path / "state" / "machine")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "machine").stat().st_mode) == 0o700
    names = sorted(path.name for path in (tmp_path / "state" / "machine").iterdir())
    assert names == ["ark.key.pem", "ask.key.pem", "cert_chain.pem", "machine.json", "vcek.key.pem", "vcek.pem"]
    for name in names:
        assert stat.S_IMODE((tmp_path / "state" / "machine" / name).stat().st_mode) == 0o600


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    directory = tmp_path / "machine"
    first = _mint(directory)
    with pytest.raises(StateError) as refused:
        _mint(directory)
    assert refused.value.code == "machine-exists"
    assert load_machine(directory).chip_id == first.chip_id
    second = _mint(directory, force=True)
    assert load_machine(directory).chip_id == second.chip_id != first.chip_id
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir(mode=0o700)
    made = _mint(tmp_path / "machine")
    assert load_machine(tmp_path / "machine").chip_id == made.chip_id
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


def test_what_a_killed_mint_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".machine.new-0123").mkdir()
    (tmp_path / ".machine.new-0123" / "ark.key.pem").write_bytes(b"half a key")
    (tmp_path / ".machine.old-0123").mkdir()
    _mint(tmp_path / "machine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".machine.old-0123", "machine"]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendError) as refused:
        _mint(tmp_path / "file" / "machine")
    assert refused.value.code == "machine-io"


@pytest.mark.parametrize("name", ["machine.json", "vcek.pem", "cert_chain.pem", "vcek.key.pem"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{}", b'{"schema": 1, "product": "Rome", "chip_id": "", "tcb": {}}', None]
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    _mint(tmp_path / "machine")
    path = tmp_path / "machine" / name
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    with pytest.raises(StateError) as refused:
        load_machine(tmp_path / "machine")
    assert refused.value.code == "machine-damaged"


def test_files_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    _mint(tmp_path / "a")
    _mint(tmp_path / "b")
    for name in ("machine.json", "vcek.key.pem", "vcek.pem"):
        original = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(StateError) as refused:
            load_machine(tmp_path / "a")
        assert refused.value.code == "machine-damaged"
        (tmp_path / "a" / name).write_bytes(original)
    load_machine(tmp_path / "a")


def test_what_is_missing_or_of_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError) as refused:
        load_machine(tmp_path / "machine")
    assert refused.value.code == "machine-missing"
    _mint(tmp_path / "machine")
    about = tmp_path / "machine" / "machine.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "schema": 2}))
    with pytest.raises(StateError) as refused:
        load_machine(tmp_path / "machine")
    assert refused.value.code == "machine-schema"


def test_the_chip_does_not_need_its_authoritys_keys(tmp_path: Path) -> None:
    _mint(tmp_path / "machine")
    for name in ("ark.key.pem", "ask.key.pem"):
        (tmp_path / "machine" / name).unlink()
    load_machine(tmp_path / "machine")


def test_keys_do_not_show() -> None:
    assert "key=" not in repr(machine())
    assert "_key=" not in repr(authority())


def test_certificates_follow_amd() -> None:
    vcek = x509.load_der_x509_certificate(machine().vcek)
    ark = x509.load_der_x509_certificate(machine().ark)
    assert {item.oid.dotted_string.rpartition(".3704.")[0] for item in vcek.extensions} == {"1.3.6.1.4.1"}
    points = ark.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert len(points) == 1
    assert [name.value for name in points[0].full_name or []] == ["https://kdsintf.amd.com/vcek/v1/Milan/crl"]
    assert (vcek.not_valid_after_utc - NOW).days == 7 * 365
    assert (ark.not_valid_after_utc - NOW).days == 25 * 365


def test_the_certificate_table_holds_the_chain() -> None:
    table = certificate_table.parse_table(machine().certificates())
    assert table == {
        certificate_table.VCEK: machine().vcek,
        certificate_table.ASK: machine().ask,
        certificate_table.ARK: machine().ark,
    }


def test_a_chip_id_has_its_lines_length() -> None:
    for line, length in ((Line.MILAN, 8), (Line.TURIN, 64), (Line.GENOA, 63)):
        with pytest.raises(StateError) as refused:
            authority(line).issue_vcek(
                machine().key.public_key(), chip_id=bytes(length), tcb=machine(line).tcb, now=NOW
            )
        assert refused.value.code == "machine-chip-id"


def test_every_authority_is_its_own_root() -> None:
    other = Authority.create(Line.MILAN, now=NOW, keys=(authority_keys()[1], authority_keys()[0]))
    other_root = hashlib.sha256(other.ark.public_bytes(Encoding.DER)).digest()
    assert other_root != machine().root_fingerprint
    assert parse_certificate(other.ark.public_bytes(Encoding.DER)).marked


@pytest.mark.parametrize("version", [3, 5])
def test_the_chip_for_the_hardware_signs_like_the_machine(version: int) -> None:
    chip = machine().chip(report_version=version)
    assert (chip.report_version, chip.certificates) == (version, machine().certificates())
    signed = chip.sign(machine().new_report(version))
    assert isinstance(signed, Report)
    assert parse_report(signed.pack()) == signed
    verdict = verify(signed.pack(), machine().vcek, chain=[machine().ask], roots=Roots.simulated(machine().ark), at=NOW)
    assert verdict.accepted
