# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm report` and `svsm machine`: exit codes, reasons, JSON keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.formats.snp.report import SIGNED_BYTES
from svsm.hardware import machine_store
from svsm.hardware.authority import Machine
from svsm.hardware.machine_store import load_machine
from tests.simulated import authority_keys


class _Files:
    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.evidence = folder / "evidence.bin"
        self.report = folder / "report.bin"
        self.vcek = self.state / "machine" / "vcek.pem"
        self.chain = self.state / "machine" / "cert_chain.pem"

    @property
    def machine(self) -> Machine:
        return load_machine(self.state / "machine")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> _Files:
    mint = machine_store.mint
    monkeypatch.setattr(machine_store, "mint", lambda *a, **k: mint(*a, authority_keys=authority_keys(), **k))
    made = _Files(tmp_path)
    assert main(["machine", "init", "--state", str(made.state)]) == 0
    assert main(["machine", "report", str(made.evidence), "--state", str(made.state), "--report-data", "0102"]) == 0
    made.report.write_bytes(made.evidence.read_bytes()[:1184])
    capsys.readouterr()
    return made


def _verify(files: _Files, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object]]:
    code = main(["report", "verify", str(files.evidence), "--json", *words])
    shown: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, shown


def test_evidence_of_a_machine_is_accepted_once_its_root_is_named(
    files: _Files, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = _verify(files, capsys)
    assert (code, shown["accepted"], shown["reason"]) == (3, False, "root-unknown")
    for name in (
        files.machine.root_fingerprint.hex(),
        f"simulated:{files.machine.root_fingerprint.hex()}",
        str(files.chain),
    ):
        code, shown = _verify(files, capsys, "--simulated-root", name)
        assert (code, shown["accepted"], shown["reason"], shown["simulated"]) == (0, True, None, True)
        assert shown["schema"] == 1
        assert "measurement" in shown["not_checked"]  # type: ignore[operator]


def test_report_and_certificates_in_their_own_files(files: _Files, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", "verify", str(files.report), "--vcek", str(files.vcek), "--simulated-root", str(files.chain)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("accepted\n  under a SIMULATED root")
    assert "not checked, since no value was given: revocation, report-data, measurement" in out
    assert main(["report", "verify", str(files.report)]) == 1
    assert "evidence-no-certificate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--report-data", "0102" + "00" * 62], None),
        (["--report-data", "00" * 64], "report-data"),
        (["--measurement", "00" * 48, "--measurement", "11" * 48], None),
        (["--measurement", "11" * 48], "report-measurement"),
        (["--host-data", "0x" + "00" * 32], None),
        (["--host-data", "11" * 32], "report-host-data"),
        (["--vmpl", "1"], "report-vmpl"),
        (["--min-tcb", "bootloader=4,snp=24"], None),
        (["--min-tcb", "snp=25"], "report-tcb-minimum"),
        (["--refuse-provisional"], None),
        (["--min-guest-svn", "1"], "report-guest-svn"),
        (["--require-single-socket"], "report-policy-flag"),
        (["--min-abi", "1.55"], "report-abi"),
        (["--id-key-digest", "00" * 48], None),
        (["--author-key-digest", "00" * 48], "report-author-key"),
        (["--require-alias-check"], None),
        (["--require-ciphertext-hiding"], "report-platform"),
        (["--require-mitigations", "0x1"], "report-mitigation"),
        (["--chip-id", "00" * 64], "report-chip-list"),
        (["--deny-chip-id", "00" * 64], None),
        (["--at", "2020-01-01"], "chain-not-yet-valid"),
        (["--at", "2199-01-01T00:00:00+02:00"], "chain-expired"),
        (["--allow-debug", "--allow-migration", "--allow-masked-chip-id", "--allow-provisional"], None),
    ],
)
def test_each_demand_is_made(
    files: _Files, capsys: pytest.CaptureFixture[str], words: list[str], reason: str | None
) -> None:
    code, shown = _verify(files, capsys, "--simulated-root", str(files.chain), *words)
    assert (code, shown["reason"]) == (0 if reason is None else 3, reason)


@pytest.mark.parametrize(
    "words",
    [
        ["--report-data", "00"],
        ["--measurement", "xyz"],
        ["--min-tcb", "cpu=1"],
        ["--min-tcb", "snp=-1"],
        ["--at", "yesterday"],
        ["--vmpl", "4"],
        ["--allow-provisional", "--refuse-provisional"],
    ],
)
def test_bad_usage_exits_with_2(files: _Files, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", "verify", str(files.evidence), *words])
    assert stopped.value.code == 2


def test_a_changed_report_is_refused_with_3(files: _Files, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(files.evidence.read_bytes())
    data[0x50] ^= 1
    files.evidence.write_bytes(data)
    assert _verify(files, capsys, "--simulated-root", str(files.chain))[1]["reason"] == "report-signature"
    assert main(["report", "verify", str(files.evidence), "--simulated-root", str(files.chain)]) == 3
    assert capsys.readouterr().out.startswith("refused: report-signature")


def test_show_takes_a_report_apart(files: _Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "show", str(files.evidence), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["version"], shown["product"], shown["vmpl"], shown["fault"]) == (5, "Milan", 0, None)
    assert shown["reported_tcb"] == {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}
    assert shown["report_data"] == "0102" + "00" * 62
    assert main(["report", "show", str(files.report)]) == 0
    assert "reported_tcb         bootloader=4 tee=0 snp=24 microcode=219" in capsys.readouterr().out


def test_show_shows_what_it_would_not_believe(files: _Files, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(files.report.read_bytes())
    data[SIGNED_BYTES:] = bytes(512)
    files.report.write_bytes(data)
    assert main(["report", "show", str(files.report)]) == 0
    assert capsys.readouterr().out.startswith("not a valid report: report-signature-range")


def test_files_that_are_not_there_or_not_reports(
    files: _Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "show", str(tmp_path / "nothing")]) == 1
    assert "report-file" in capsys.readouterr().err
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    assert main(["report", "show", str(huge)]) == 1
    assert "report-file" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello")
    assert main(["report", "verify", str(tmp_path / "text"), "--vcek", str(files.vcek)]) == 1
    assert "evidence-format" in capsys.readouterr().err


def test_machine_show_and_init(files: _Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "show", "--state", str(files.state), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["root_fingerprint"] == files.machine.root_fingerprint.hex()
    assert (shown["schema"], shown["simulated"], shown["product"]) == (1, True, "Milan")
    before = files.machine.chip_id
    assert main(["machine", "report", str(files.evidence), "--state", str(files.state)]) == 1
    assert "report-exists" in capsys.readouterr().err
    assert before == files.machine.chip_id


def test_machine_init_never_overwrites_unasked(
    tmp_path: Path, files: _Files, capsys: pytest.CaptureFixture[str]
) -> None:
    # A fresh state directory: the fixture's is still locked by this process.
    other = tmp_path / "other"
    other.mkdir()
    (other / "state.json").write_bytes((files.state / "state.json").read_bytes())
    (other / "machine").mkdir()
    (other / "machine" / "machine.json").write_text("{}")
    assert main(["machine", "init", "--state", str(other)]) == 1
    assert "machine-exists" in capsys.readouterr().err
    assert (other / "machine" / "machine.json").read_text() == "{}"
