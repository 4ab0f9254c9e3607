# SPDX-License-Identifier: MIT OR Apache-2.0
"""Launch digests of OVMF against sev-snp-measure (PyPI), live and as recorded in the vectors."""

from __future__ import annotations

import functools
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from svsm.formats.errors import FormatError
from svsm.formats.igvm import IgvmFile
from svsm.formats.ovmf import Ovmf
from svsm.launch.digest import launch_digest
from svsm.launch.ovmf_image import CPU_SIGNATURES, cpu_model_signature, describe_ovmf_launch
from tests.support import absent, vectors

pytestmark = pytest.mark.interop

SEV_METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc").bytes_le
_FOLDERS = (Path("/usr/share/ovmf"), Path("/usr/share/OVMF"))


def _debian(name: str) -> Path:
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise absent(f"Debian's package ovmf ({name}) is not installed")


def _ours(path: Path, **options: int) -> str:
    """Through the bytes of an IGVM file, as somebody who is handed that file would measure it."""
    image = describe_ovmf_launch(Ovmf.parse(path.read_bytes()), **options).pack()
    return launch_digest(IgvmFile.parse(image), native_zero=True).hex()


@pytest.mark.parametrize("vcpus", [1, 64])
@pytest.mark.parametrize(("model", "features"), [("EPYC-v4", 1), ("EPYC-Milan-v2", 0x21)])
def test_an_igvm_that_describes_the_ovmf_launch(vcpus: int, model: str, features: int) -> None:
    from sevsnpmeasure import guest, sev_mode, vcpu_types

    firmware = _debian("OVMF.fd")
    signature = vcpu_types.CPU_SIGS[model]
    theirs = guest.calc_launch_digest(
        sev_mode.SevMode.SEV_SNP, vcpus, signature, str(firmware), "", "", "", features
    ).hex()
    assert cpu_model_signature(model) == signature
    assert _ours(firmware, vcpus=vcpus, signature=signature, sev_features=features) == theirs


def test_cpu_signatures_are_theirs() -> None:
    from sevsnpmeasure import vcpu_types

    assert {name: cpu_model_signature(name) for name in vcpu_types.CPU_SIGS} == vcpu_types.CPU_SIGS
    assert {name.partition("-v")[0].removesuffix("-IBPB") for name in vcpu_types.CPU_SIGS} == set(CPU_SIGNATURES)


@functools.cache
def _cases() -> list[dict[str, Any]]:
    recorded = json.loads((vectors("igvm") / "ovmf_goldens.json").read_text())
    return [
        case
        for case in recorded["cases"]
        if case["mode"] == "snp" and case.get("vmm_type", "QEMU") == "QEMU" and "kernel" not in case
    ]


def _path(firmware: str) -> Path:
    if firmware.startswith("Debian "):
        return _debian(firmware.removeprefix("Debian "))
    return vectors("igvm") / "ovmf" / firmware


def _signature(case: dict[str, Any]) -> int:
    from svsm.launch.ovmf_image import cpu_signature

    if "vcpu_sig" in case:
        return int(str(case["vcpu_sig"]), 0)
    if "vcpu_family" in case:
        return cpu_signature(*(int(case[f"vcpu_{name}"]) for name in ("family", "model", "stepping")))
    return cpu_model_signature(case["vcpu_type"])


def test_recorded_goldens() -> None:
    """Every recorded digest of the plain SNP mode; firmware without SEV metadata is refused, not measured."""
    equal = refused = 0
    for case in _cases():
        if "snp_ovmf_hash" in case or "error" in case:
            continue
        features = int(case.get("guest_features", "0x1"), 0)
        path = _path(case["firmware"])
        if case["firmware"] in ("Debian OVMF_CODE_4M.fd", "synthetic-nometa-guest.fd"):
            with pytest.raises(FormatError) as caught:
                Ovmf.parse(path.read_bytes())
            assert caught.value.code == "ovmf-no-sev-metadata"
            refused += 1
            continue
        assert _ours(path, vcpus=case["vcpus"], signature=_signature(case), sev_features=features) == case["digest"], (
            case
        )
        equal += 1
    assert equal >= 60
    assert refused >= 10


@pytest.mark.parametrize("name", ["OVMF_CODE_4M.fd", "OVMF_CODE_4M.ms.fd", "OVMF_CODE_4M.secboot.fd"])
def test_a_4m_variant_is_refused_where_it_has_no_sev_metadata(name: str) -> None:
    """Debian 12's have none, Debian 13's have."""
    from sevsnpmeasure import guest, sev_mode

    firmware = _debian(name)
    if SEV_METADATA in firmware.read_bytes():
        theirs = guest.calc_launch_digest(sev_mode.SevMode.SEV_SNP, 1, 0, str(firmware), "", "", "", 1).hex()
        assert _ours(firmware, vcpus=1, signature=0, sev_features=1) == theirs
        return
    with pytest.raises(FormatError) as caught:
        Ovmf.parse(firmware.read_bytes())
    assert caught.value.code == "ovmf-no-sev-metadata"
