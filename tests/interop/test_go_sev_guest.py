# SPDX-License-Identifier: MIT OR Apache-2.0
"""go-sev-guest's `check`, unmodified, judges simulated and real evidence; where it trusts too much, we refuse.

Install: GOBIN=DIR go install github.com/google/go-sev-guest/tools/check@v0.14.1, then rename DIR/check to
`go-sev-guest-check`. `tests/support.py` says where it is looked for.
`check` has no clock option, so machines are minted at the present time.
"""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest

from svsm.broker.verifier import ReportPolicy, Roots, verify
from svsm.formats.snp import certificate_table
from svsm.formats.snp.certs import certificates_from
from svsm.formats.snp.evidence import open_evidence
from svsm.formats.snp.policy import GuestPolicy
from svsm.formats.snp.report import Report
from svsm.formats.snp.tcb import Line
from svsm.hardware.authority import Machine
from svsm.hardware.machine_store import mint
from tests.simulated import authority_keys
from tests.support import peer, vectors

pytestmark = pytest.mark.interop

_DATA, _DIGEST, _HOST = b"d" * 64, b"m" * 48, b"h" * 32


@pytest.fixture(scope="module", params=[Line.MILAN, Line.GENOA])
def minted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Path]:
    directory = tmp_path_factory.mktemp("machine") / "machine"
    return mint(directory, product=request.param, authority_keys=authority_keys()), directory / "cert_chain.pem"


def _report(machine: Machine, version: int) -> Report:
    report = machine.new_report(version)
    return report.replace(policy=0x30000, report_data=_DATA, measurement=_DIGEST, host_data=_HOST)


def _check(folder: Path, line: str, evidence: bytes, root: Path | None, *words: str) -> int:
    path = folder / "evidence.bin"
    path.write_bytes(evidence)
    named = [] if root is None else [f"-product_key_path={root}"]
    command = [str(peer("go-sev-guest-check")), "-in", str(path), "-inform=bin", "-network=false", f"-product={line}"]
    done = subprocess.run([*command, *named, "-vmpl=0", *words], capture_output=True, timeout=60, check=False)
    assert b"panic" not in done.stderr
    return done.returncode


@pytest.mark.parametrize("version", [3, 5])
def test_simulated_evidence_is_accepted_under_its_root(
    minted: tuple[Machine, Path], tmp_path: Path, version: int
) -> None:
    machine, root = minted
    evidence = machine.sign_report(_report(machine, version)) + machine.certificates()
    values = [f"-report_data={_DATA.hex()}", f"-measurement={_DIGEST.hex()}", f"-host_data={_HOST.hex()}"]
    accepts = ["-guest_policy=0x30000", *values]
    assert _check(tmp_path, machine.line, evidence, root, *accepts) == 0
    assert _check(tmp_path, machine.line, evidence, root, "-guest_policy=0x30000", f"-host_data={bytes(32).hex()}") == 5


@pytest.mark.parametrize(
    ("code", "change"),
    [
        (5, {"vmpl": 1}),
        (5, {"policy": 0x30000 | GuestPolicy.DEBUG}),
        (5, {"chip_id": b"c" * 64}),
        (5, {"current_build": 99}),
        (1, {"reserved_330": b"\x01" + bytes(367)}),
    ],
)
def test_both_refuse_the_same(
    minted: tuple[Machine, Path], tmp_path: Path, code: int, change: dict[str, int | bytes]
) -> None:
    machine, root = minted
    signed = machine.sign_report(_report(machine, 5).replace(**change))
    assert _check(tmp_path, machine.line, signed + machine.certificates(), root, "-guest_policy=0x30000") == code
    verdict = verify(
        signed,
        machine.vcek,
        chain=[machine.ask],
        roots=Roots.simulated(machine.ark),
        at=datetime.datetime.now(datetime.UTC),
        policy=ReportPolicy(allow_provisional=False),
    )
    assert not verdict.accepted


def test_both_refuse_a_flipped_bit(minted: tuple[Machine, Path], tmp_path: Path) -> None:
    machine, root = minted
    evidence = bytearray(machine.sign_report(_report(machine, 5)) + machine.certificates())
    evidence[0x90] ^= 1
    assert _check(tmp_path, machine.line, bytes(evidence), root, "-guest_policy=0x30000") == 2


def test_a_root_that_came_with_the_evidence_convinces_only_the_other(
    minted: tuple[Machine, Path], tmp_path: Path
) -> None:
    # Without a named root `check` believes the table's own (go-sev-guest#185, fixed in later releases): that a
    # forged chain passes there is why its verdict counts only with -product_key_path, and why ours refuses it.
    machine, _ = minted
    signed = machine.sign_report(_report(machine, 5))
    assert _check(tmp_path, machine.line, signed + machine.certificates(), None, "-guest_policy=0x30000") in {0, 2}
    verdict = verify(
        signed,
        machine.vcek,
        chain=[machine.ask, machine.ark],
        roots=Roots.amd(),
        at=datetime.datetime.now(datetime.UTC),
    )
    assert verdict.reason == "root-unknown"


@pytest.mark.parametrize(
    ("name", "vcek", "line", "words", "code"),
    [
        ("milan-v2-vcek.report.bin", "milan-v2-vcek.vcek.der", "Milan", ["-provisional=true"], 0),
        ("milan-v2-vcek.report.bin", "milan-v2-vcek.vcek.der", "Milan", [], 5),
        ("azure-milan-v2.hcl-report.bin", "azure-milan-v2.vcek.pem", "Milan", ["-provisional=true"], 0),
        ("azure-genoa-v3.report.bin", "azure-genoa-v3.vcek.pem", "Genoa", [], 0),
        ("milan-v2-debug.report.bin", "milan-v2-debug.vcek.der", "Milan", [], 5),
        ("milan-v2-vcek.report.bin", "milan-v2-debug.vcek.der", "Milan", ["-provisional=true"], 2),
    ],
)
def test_it_reads_our_table_round_real_reports(
    tmp_path: Path, name: str, vcek: str, line: str, words: list[str], code: int
) -> None:
    folder = vectors("snp")
    published = (folder / f"{line.lower()}.ask_ark_asvk.pem").read_text()
    root = tmp_path / "root.pem"
    root.write_text("-----BEGIN".join(published.split("-----BEGIN")[:3]))
    report = open_evidence((folder / name).read_bytes()).report
    certificate = certificates_from((folder / vcek).read_bytes())[0]
    evidence = report + certificate_table.pack_table({certificate_table.VCEK: certificate.raw})
    assert _check(tmp_path, line, evidence, root, "-guest_policy=0x30000", *words) == code
