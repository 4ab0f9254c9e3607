# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our image: where everything is in guest memory, and the IGVM file that puts it there.

    0x0000_1000  secrets page
    0x0000_2000  CPUID page
    0x0000_4000  launch configuration, 4 pages, a parameter area: unmeasured, filled by the host, believed only if its
                 digest is the report's HOST_DATA
    0x0000_8000  device tree, 4 pages, a parameter area: unmeasured, filled by the loader, never believed: it says where
                 devices are, and the kernel checks each place
    0x0001_0000  loader
    0x0780_0000  settings of the owner, one page
    0x0800_0000  payload archive
    0xFFFF_FFFF_F000  VMSA

Launch order: parameter areas, secrets, CPUID, loader, archive, settings, VMSA. Settings come last so that everything
before them has one digest for all owners; the parameter areas come first because QEMU launches inserts before the
pages that precede them in the file, and this way there is no other order to launch in.

The VMSA tells the loader what is where; since it is measured, nobody can tell it otherwise.
"""

from __future__ import annotations

from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.igvm import HeaderType, IgvmBuilder, IgvmFile, PageDataType, PlatformType
from svsm.formats.record import Buffer
from svsm.formats.snp.page_info import KVM_VMSA_GPA
from svsm.formats.snp.vmsa import Segment, Vmsa
from svsm.launch.digest import SETTINGS_GPA, settings_page

__all__ = [
    "ARCHIVE_GPA",
    "CONFIGURATION_AREA_INDEX",
    "CONFIGURATION_BYTES",
    "CONFIGURATION_GPA",
    "CPUID_GPA",
    "DEFAULT_POLICY",
    "DEVICE_TREE_AREA_INDEX",
    "DEVICE_TREE_BYTES",
    "DEVICE_TREE_GPA",
    "GUEST_BYTES",
    "GUEST_GPA",
    "LOADER_GPA",
    "SECRETS_GPA",
    "build_image",
    "describe_image",
    "start_vmsa",
]

SECRETS_GPA: Final = 0x1000
CPUID_GPA: Final = 0x2000
CONFIGURATION_GPA: Final = 0x4000
CONFIGURATION_BYTES: Final = 0x4000
CONFIGURATION_AREA_INDEX: Final = 0
DEVICE_TREE_GPA: Final = 0x8000
DEVICE_TREE_BYTES: Final = 0x4000
DEVICE_TREE_AREA_INDEX: Final = 1
LOADER_GPA: Final = 0x1_0000
ARCHIVE_GPA: Final = 0x0800_0000
GUEST_GPA: Final = 0x4000_0000
GUEST_BYTES: Final = 16 << 20

DEFAULT_POLICY: Final = 0x3_0000
"""Simultaneous multithreading allowed, the bit that must be one, no debugging, no migration."""

_SNP_ACTIVE: Final = 1
_CODE: Final = Segment(0x8, 0xC9B, 0xFFFF_FFFF, 0)
_DATA: Final = Segment(0x10, 0xC93, 0xFFFF_FFFF, 0)
_EMPTY_TABLE: Final = Segment(0, 0, 0xFFFF, 0)


def start_vmsa(*, loader_bytes: int, archive_bytes: int) -> Vmsa:
    """The start state of the boot processor: flat protected mode and the register contract.

    Args:
        loader_bytes: Length of the loader without padding.
        archive_bytes: Length of the payload archive without padding.
    """
    return Vmsa(
        es=_DATA,
        cs=_CODE,
        ss=_DATA,
        ds=_DATA,
        fs=_DATA,
        gs=_DATA,
        gdtr=_EMPTY_TABLE,
        idtr=_EMPTY_TABLE,
        ldtr=Segment(0, 0x82, 0xFFFF, 0),
        tr=Segment(0, 0x8B, 0xFFFF, 0),
        efer=0x1000,  # SVME, which KVM sets in every VMSA
        cr4=0x40,  # MCE, likewise
        cr0=0x31,  # PE, ET, NE
        dr7=0x400,
        dr6=0xFFFF_0FF0,
        rflags=0x2,
        g_pat=0x0007_0406_0007_0406,
        xcr0=0x1,
        mxcsr=0x1F80,
        x87_fcw=0x37F,
        sev_features=_SNP_ACTIVE,
        rip=LOADER_GPA,
        rcx=loader_bytes,
        rdx=ARCHIVE_GPA,
        r8=archive_bytes,
        rsi=SETTINGS_GPA,
        rdi=CONFIGURATION_GPA,
        r9=DEVICE_TREE_GPA,
        rbx=SECRETS_GPA,
    )


def build_image(
    *, loader: Buffer, archive: Buffer, settings: Buffer, policy: int = DEFAULT_POLICY, vtom_gpa: int = 0
) -> bytes:
    """The IGVM file (format version 1, SEV-SNP) of our image.

    Args:
        loader: Python source, run first.
        archive: The payload archive.
        settings: The owner's settings, at most 4096 bytes; padded with zeroes.
        policy: SNP guest policy (AMD 56860 table 10).
        vtom_gpa: Shared memory boundary, 0 for none.

    Raises:
        FormatError: ``image-loader``, ``image-archive``, ``image-settings`` for a part that does not fit its place;
            ``image-policy`` for a policy that no SNP firmware accepts.
    """
    return describe_image(loader=loader, archive=archive, settings=settings, policy=policy, vtom_gpa=vtom_gpa).pack()


def describe_image(
    *, loader: Buffer, archive: Buffer, settings: Buffer, policy: int = DEFAULT_POLICY, vtom_gpa: int = 0
) -> IgvmFile:
    """As `build_image`, before packing."""
    if not 0 < len(loader) <= SETTINGS_GPA - LOADER_GPA:
        raise FormatError("the loader does not fit its place", code="image-loader", got=len(loader))
    if not 0 < len(archive) <= GUEST_GPA - ARCHIVE_GPA:
        raise FormatError("the payload does not fit its place", code="image-archive", got=len(archive))
    if not 0 <= policy < 1 << 64 or not policy & 1 << 17:
        raise FormatError("bit 17 of an SNP policy must be one", code="image-policy", got=policy)
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP, shared_gpa_boundary=vtom_gpa)
    builder.policy(policy)
    builder.required_memory(GUEST_GPA, GUEST_BYTES)
    builder.parameter_area(CONFIGURATION_AREA_INDEX, CONFIGURATION_BYTES)
    builder.parameter_insert(CONFIGURATION_GPA, index=CONFIGURATION_AREA_INDEX)
    builder.parameter_area(DEVICE_TREE_AREA_INDEX, DEVICE_TREE_BYTES)
    builder.parameter(HeaderType.DEVICE_TREE, index=DEVICE_TREE_AREA_INDEX, byte_offset=0)
    builder.parameter_insert(DEVICE_TREE_GPA, index=DEVICE_TREE_AREA_INDEX)
    builder.page(SECRETS_GPA, data_type=PageDataType.SECRETS)
    builder.page(CPUID_GPA, data_type=PageDataType.CPUID_DATA)
    builder.pages(LOADER_GPA, loader)
    builder.pages(ARCHIVE_GPA, archive)
    builder.page(SETTINGS_GPA, settings_page(settings))
    vmsa = start_vmsa(loader_bytes=len(loader), archive_bytes=len(archive))
    builder.vp_context(KVM_VMSA_GPA, vmsa.pack(), vp_index=0)
    return builder.finish()
