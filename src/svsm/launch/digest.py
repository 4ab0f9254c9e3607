# SPDX-License-Identifier: MIT OR Apache-2.0
"""Launch digests of IGVM files.

Three values name an image:

* the *launch digest*, which a report carries as MEASUREMENT;
* the *KVM digest*: the same when VMSAs are launched last, as KVM does whatever the file says;
* the *payload digest* of an image in our layout: the chain value before the owner's settings page. It is the same for
  every owner, and the launch digest follows from it, the settings and the VMSA without the image.
"""

from __future__ import annotations

from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.igvm import IgvmFile, LaunchStep, Order, PlatformType, StepKind, plan_runs
from svsm.formats.record import Buffer
from svsm.formats.snp.digest import KnownDigests, LaunchDigest
from svsm.formats.snp.page_info import KVM_VMSA_GPA, PageType
from svsm.formats.snp.vmsa import Vmsa

__all__ = [
    "SETTINGS_BYTES",
    "SETTINGS_GPA",
    "launch_digest",
    "launch_digest_from_payload",
    "payload_digest",
    "settings_page",
]

SETTINGS_GPA: Final = 0x0780_0000
"""Where an image in our layout has the owner's settings: the last measured page before the VMSA."""

SETTINGS_BYTES: Final = 4096


def launch_digest(
    file: IgvmFile,
    platform: PlatformType = PlatformType.SEV_SNP,
    *,
    order: Order = Order.FILE,
    native_zero: bool = False,
    known: KnownDigests | None = None,
) -> bytes:
    """The launch digest of `file`: 48 bytes.

    Args:
        file: A parsed file.
        platform: Only SEV_SNP.
        order: When VMSAs are launched.
        native_zero: Empty pages are ZERO pages instead of NORMAL pages of zeroes.
        known: As for `LaunchDigest.extend`; only for calls with the same `file`.

    Raises:
        FormatError: As `svsm.formats.igvm.plan`.
    """
    digest = LaunchDigest()
    digest.extend(plan_runs(file, platform, order=order, native_zero=native_zero), known=known)
    return digest.value


def payload_digest(file: IgvmFile, *, known: KnownDigests | None = None) -> bytes:
    """The chain value before the settings page of an image in our layout: 48 bytes.

    Args:
        file: A parsed file.
        known: As for `launch_digest`: after that, only the chain is left to compute.

    Raises:
        FormatError: ``igvm-not-our-layout`` for any other file.
    """
    steps = [run for run in plan_runs(file) if run.page_type is not None]
    if not _our_layout(steps):
        raise FormatError("the image does not have this project's layout", code="igvm-not-our-layout")
    digest = LaunchDigest()
    digest.extend(steps[:-2], known=known)
    return digest.value


def _our_layout(steps: list[LaunchStep]) -> bool:
    if len(steps) < 3 or any(step.kind is StepKind.VMSA for step in steps[:-1]):
        return False
    settings, vmsa = steps[-2:]
    place = settings.page_type, settings.gpa, settings.pages
    if place != (PageType.NORMAL, SETTINGS_GPA, 1) or settings.contents is None:
        return False
    if (vmsa.page_type, vmsa.gpa) != (PageType.VMSA, KVM_VMSA_GPA) or vmsa.contents is None:
        return False
    return Vmsa.parse(vmsa.contents).rsi == SETTINGS_GPA


def settings_page(settings: Buffer) -> bytes:
    """Settings as the page that is measured: padded with zeroes to 4096 bytes.

    Raises:
        FormatError: ``image-settings`` when they are longer.
    """
    if len(settings) > SETTINGS_BYTES:
        raise FormatError(
            "the settings do not fit their page", code="image-settings", expected=SETTINGS_BYTES, got=len(settings)
        )
    return bytes(settings).ljust(SETTINGS_BYTES, b"\0")


def launch_digest_from_payload(payload: Buffer, settings: Buffer, vmsa: Buffer) -> bytes:
    """The launch digest of the image with that payload digest, another owner's settings and that VMSA.

    Args:
        payload: Payload digest, 48 bytes.
        settings: At most 4096 bytes.
        vmsa: 4096 bytes; the same for every owner of a payload.

    Raises:
        FormatError: ``digest-length``, ``digest-page``, ``image-settings``.
    """
    digest = LaunchDigest(payload)
    digest.update(PageType.NORMAL, SETTINGS_GPA, settings_page(settings))
    digest.update(PageType.VMSA, KVM_VMSA_GPA, vmsa)
    return digest.value
