# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm igvm …` end to end in process: output, exit codes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from svsm.cli.main import main
from svsm.formats.igvm import IgvmFile, plan
from svsm.formats.settings import Settings
from svsm.launch.build import build_image
from svsm.launch.digest import launch_digest, payload_digest
from tests.support import vectors
from tests.unit.formats.test_ovmf import firmware


@dataclasses.dataclass(frozen=True)
class _Payload:
    loader: bytes = b"print('loader')"
    archive: bytes = b"archive"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.igvm"
    path.write_bytes(build_image(loader=b"l", archive=b"a", settings=b"s"))
    return path


@pytest.fixture
def ovmf(tmp_path: Path) -> Path:
    path = tmp_path / "firmware.fd"
    path.write_bytes(firmware([(0x800000, 0x2000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)]))
    return path


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    loaded: dict[str, Any] = json.loads(out)
    assert loaded["schema"] == 1
    return loaded


def test_measure(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["igvm", "measure", str(image), "--platform", "sev-snp", "--json"]) == 0
    found = _json(capsys)
    file = IgvmFile.parse(image.read_bytes())
    assert found["launch_digest"] == found["kvm_launch_digest"] == launch_digest(file).hex()
    assert found["native_zero_launch_digest"] == found["launch_digest"]
    assert found["payload_digest"] == payload_digest(file).hex()
    assert main(["igvm", "measure", str(image)]) == 0
    assert found["launch_digest"] in capsys.readouterr().out


def test_measure_a_file_of_somebody_else(capsys: pytest.CaptureFixture[str]) -> None:
    path = vectors("igvm") / "files" / "platform-snp-v1.igvm"
    assert main(["igvm", "measure", str(path), "--json"]) == 0
    found = _json(capsys)
    assert found["launch_digest"].startswith("eb664f39f7c343d0d2c8a1b77588670f82311468be9e9271")
    assert "payload_digest" not in found


def test_inspect(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["igvm", "inspect", str(image), "--json"]) == 0
    found = _json(capsys)
    assert [entry["header"] for entry in found["launch"]][-1] == "VP_CONTEXT"
    assert main(["igvm", "inspect", str(image)]) == 0
    out = capsys.readouterr().out
    assert "SUPPORTED_PLATFORM platform=SEV_SNP mask=0x1" in out
    assert "gpa=0x7800000" in out


def test_ovmf_measure_and_build_agree(ovmf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ovmf", str(ovmf), "--vcpus", "3", "--vcpu-type", "EPYC-Milan-v2", "--guest-features", "0x21"]
    assert main(["igvm", "measure", *options, "--json"]) == 0
    measured = _json(capsys)
    out = tmp_path / "out.igvm"
    assert main(["igvm", "build", *options, "-o", str(out), "--json"]) == 0
    assert _json(capsys)["launch_digest"] == measured["launch_digest"]
    assert main(["igvm", "measure", str(out), "--native-zero", "--json"]) == 0
    assert _json(capsys)["launch_digest"] == measured["launch_digest"]
    assert main(["igvm", "measure", str(out), "--json"]) == 0
    plain = _json(capsys)
    assert plain["native_zero_launch_digest"] == measured["launch_digest"] != plain["launch_digest"]
    assert len([step for step in plan(IgvmFile.parse(out.read_bytes())) if step.kind.value == "vmsa"]) == 3


def test_a_cpu_signature_in_place_of_a_model(ovmf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["igvm", "measure", "--ovmf", str(ovmf), "--vcpu-signature", "0x800f12", "--json"]) == 0
    by_number = _json(capsys)
    assert main(["igvm", "measure", "--ovmf", str(ovmf), "--vcpu-type", "EPYC", "--json"]) == 0
    assert _json(capsys) == by_number


def _key(path: Path, curve: ec.EllipticCurve) -> bytes:
    public = ec.generate_private_key(curve).public_key()
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_build_our_own_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("svsm.launch.payload")
    monkeypatch.setattr(module, "build_payload", _Payload, raising=False)
    monkeypatch.setitem(sys.modules, "svsm.launch.payload", module)
    key, out = _key(tmp_path / "broker.pem", ec.SECP384R1()), tmp_path / "own.igvm"
    words = ["igvm", "build", "--broker-key", str(tmp_path / "broker.pem"), "-o", str(out), "--json"]
    assert main(words) == 0
    found = _json(capsys)
    expected = build_image(loader=_Payload.loader, archive=_Payload.archive, settings=Settings(key).pack())
    assert out.read_bytes() == expected
    assert found["launch_digest"] == launch_digest(IgvmFile.parse(expected)).hex()
    assert main(words) == 1
    assert "igvm-exists" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["measure"], 2, "usage"),
        (["measure", "IMAGE", "--ovmf", "OVMF"], 2, "usage"),
        (["measure", "IMAGE", "--vcpus", "2"], 1, "ovmf-launch"),
        (["measure", "--ovmf", "IMAGE"], 1, "ovmf-"),
        (["measure", "OVMF"], 1, "igvm-magic"),
        (["measure", "MISSING"], 1, "igvm-file"),
        (["measure", "IMAGE", "--check-id-block"], 3, "id-block-absent"),
        (["measure", "--ovmf", "OVMF", "--vcpus", "0"], 1, "ovmf-launch"),
        (["measure", "--ovmf", "OVMF", "--vcpus", "4097"], 1, "ovmf-launch"),
        (["measure", "--ovmf", "OVMF", "--vcpu-type", "Xeon"], 1, "ovmf-launch"),
        (["measure", "--ovmf", "OVMF", "--guest-features", "0x20"], 1, "ovmf-launch"),
        (["inspect", "OVMF"], 1, "igvm-magic"),
        (["build", "-o", "OUT"], 2, "usage"),
        (["build", "-o", "OUT", "--broker-key", "IMAGE"], 1, "id-key"),
        (["build", "-o", "OUT", "--broker-key", "P256"], 1, "id-key"),
        (["build", "-o", "MISSING/OUT", "--ovmf", "OVMF"], 1, "igvm-file"),
    ],
)
def test_refusals(
    words: list[str],
    exit_code: int,
    message: str,
    image: Path,
    ovmf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _key(tmp_path / "p256.pem", ec.SECP256R1())
    places = {"IMAGE": image, "OVMF": ovmf, "MISSING": tmp_path / "no", "OUT": tmp_path / "out"}
    places |= {"P256": tmp_path / "p256.pem", "MISSING/OUT": tmp_path / "no" / "out"}
    assert main(["igvm", *(str(places.get(word, word)) for word in words)]) == exit_code
    captured = capsys.readouterr()
    assert message in captured.err
    assert ("hint: " in captured.err) >= (message in ("igvm-magic", "id-key"))
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_unknown_platform_is_a_usage_error(image: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["igvm", "measure", str(image), "--platform", "tdx"])
    assert caught.value.code == 2


def test_a_number_that_is_none_is_a_usage_error(ovmf: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["igvm", "measure", "--ovmf", str(ovmf), "--vcpus", "many"])
    assert caught.value.code == 2
