# SPDX-License-Identifier: MIT OR Apache-2.0
"""An IGVM file that describes how QEMU launches an OVMF firmware without one.

QEMU launches the firmware's pages, then the sections of its SEV metadata in their order, then one VMSA a vCPU. It
launches memory sections as ZERO pages; IGVM has no such page, only empty ones, so the digest of the file equals
that launch's when empty pages are measured as ZERO (``native_zero=True``). CPU type and features are part of it
because they are in the VMSA: EDX at reset is the CPUID signature.

Kernel, initrd and command line are not supported (they would fill the kernel hashes section).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.igvm import IgvmBuilder, IgvmFile, PageDataType, PlatformType
from svsm.formats.ovmf import FOUR_GIB, Ovmf, Section, SectionType
from svsm.formats.snp.page_info import KVM_VMSA_GPA
from svsm.formats.snp.vmsa import Segment, Vmsa

__all__ = ["CPU_SIGNATURES", "MAX_VCPUS", "cpu_model_signature", "cpu_signature", "describe_ovmf_launch", "ovmf_vmsa"]

MAX_VCPUS: Final = 4096

_RESET_VECTOR: Final = 0xFFFF_FFF0


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """CPUID Fn0000_0001_EAX of a processor (AMD 25481: extended family and model above 0xF)."""
    base, extended = min(family, 0xF), max(0, family - 0xF)
    return extended << 20 | model >> 4 << 16 | base << 8 | (model & 0xF) << 4 | stepping


CPU_SIGNATURES: Final = MappingProxyType(
    {
        "EPYC": cpu_signature(0x17, 0x01, 2),
        "EPYC-Rome": cpu_signature(0x17, 0x31, 0),
        "EPYC-Milan": cpu_signature(0x19, 0x01, 1),
        "EPYC-Genoa": cpu_signature(0x19, 0x11, 0),
        "EPYC-Turin": cpu_signature(0x1A, 0x00, 0),
    }
)
"""QEMU's CPU models; their ``-v…`` variants have the same signature."""


def cpu_model_signature(model: str) -> int:
    """The CPUID signature of a QEMU CPU model, with or without its ``-v…`` or ``-IBPB`` suffix.

    Raises:
        FormatError: ``ovmf-launch`` for a model that is not known.
    """
    base, _, version = model.partition("-v")
    found = CPU_SIGNATURES.get(base.removesuffix("-IBPB"))
    if found is None or (version and not version.isdecimal()):
        raise FormatError(
            f"the CPU model {model} is not known",
            code="ovmf-launch",
            hint=f"known: {', '.join(CPU_SIGNATURES)}, each with -v…; or give the CPUID signature",
        )
    return found


def ovmf_vmsa(eip: int, *, signature: int, sev_features: int) -> Vmsa:
    """The VMSA that KVM makes for a QEMU guest at reset: real mode, `eip` split over CS base and RIP."""
    data = Segment(0, 0x93, 0xFFFF, 0)
    return Vmsa(
        es=data,
        cs=Segment(0xF000, 0x9B, 0xFFFF, eip & 0xFFFF_0000),
        ss=data,
        ds=data,
        fs=data,
        gs=data,
        gdtr=Segment(0, 0, 0xFFFF, 0),
        ldtr=Segment(0, 0x82, 0xFFFF, 0),
        idtr=Segment(0, 0, 0xFFFF, 0),
        tr=Segment(0, 0x8B, 0xFFFF, 0),
        efer=0x1000,
        cr4=0x40,
        cr0=0x10,
        dr7=0x400,
        dr6=0xFFFF_0FF0,
        rflags=0x2,
        rip=eip & 0xFFFF,
        rdx=signature,
        g_pat=0x0007_0406_0007_0406,
        sev_features=sev_features,
        xcr0=0x1,
        mxcsr=0x1F80,
        x87_fcw=0x37F,
    )


def describe_ovmf_launch(
    firmware: Ovmf, *, vcpus: int, signature: int, sev_features: int = 1, policy: int = 0x3_0000
) -> IgvmFile:
    """The launch of `firmware` by QEMU on KVM, as an IGVM file (format version 1).

    Args:
        firmware: With SEV metadata.
        vcpus: 1 to 4096.
        signature: CPUID signature of the guest's CPU model, see `CPU_SIGNATURES`.
        sev_features: SEV_FEATURES of each VMSA; bit 0 (SNP) must be set.
        policy: SNP guest policy; not part of the digest.

    Raises:
        FormatError: ``ovmf-launch`` for impossible arguments, or firmware without a reset address when it is needed.
    """
    if not 1 <= vcpus <= MAX_VCPUS:
        raise FormatError("the number of vCPUs is out of range", code="ovmf-launch", expected=MAX_VCPUS, got=vcpus)
    if not sev_features & 1 or not 0 <= signature < FOUR_GIB:
        raise FormatError("not an SNP guest's features or CPU signature", code="ovmf-launch", got=sev_features)
    if vcpus > 1 and firmware.reset_eip is None:
        raise FormatError("the firmware does not say where further vCPUs start", code="ovmf-launch", got=vcpus)
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.policy(policy)
    builder.pages(firmware.gpa, firmware.image)
    for section in firmware.sections:
        _add_section(builder, section)
    boot = ovmf_vmsa(_RESET_VECTOR, signature=signature, sev_features=sev_features).pack()
    builder.vp_context(KVM_VMSA_GPA, boot, vp_index=0)
    other = ovmf_vmsa(firmware.reset_eip or 0, signature=signature, sev_features=sev_features).pack()
    for index in range(1, vcpus):
        builder.vp_context(KVM_VMSA_GPA, other, vp_index=index)
    return builder.finish()


def _add_section(builder: IgvmBuilder, section: Section) -> None:
    if section.section_type is SectionType.SNP_SECRETS:
        builder.page(section.gpa, data_type=PageDataType.SECRETS)
    elif section.section_type is SectionType.CPUID:
        builder.page(section.gpa, data_type=PageDataType.CPUID_DATA)
    else:  # plain memory, the SVSM calling area and, without a kernel, the hashes page: all launched as zeroes
        for gpa in range(section.gpa, section.gpa + section.size_bytes, 4096):
            builder.page(gpa)
