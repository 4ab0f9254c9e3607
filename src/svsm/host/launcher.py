# SPDX-License-Identifier: MIT OR Apache-2.0
"""Loading an IGVM image into the machine: what a hypervisor's IGVM loader does on KVM.

The pages go into shared memory at their address; LAUNCH_UPDATE takes them from there, and the firmware measures what
it finds. The loader compares nothing: whether the guest is the right one is for the guest's owner, who sees the
report.

The launch configuration goes, as the volume's owner wrote it, into the first parameter area, behind its length; its
SHA-256 becomes HOST_DATA. That is what ties the unmeasured page to the report. The device tree goes where the image
asks for one; nothing ties it to anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Final

from svsm.formats.boot_devices import BootDevices
from svsm.formats.errors import BackendError, FormatError, ProtocolError
from svsm.formats.igvm import HeaderType, IgvmFile, Order, PlatformType, StepKind, guest_policy, plan_runs
from svsm.formats.igvm.id_block import split_header
from svsm.formats.igvm.launch import id_block_header
from svsm.formats.igvm.layout import PAGE_SIZE, Parameter, ParameterArea
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.hardware_messages import HostCommand
from svsm.formats.snp.page_info import PageType
from svsm.host.hardware_port import HardwarePort

__all__ = ["DEFAULT_POLICY", "NO_DEVICES", "Launched", "configuration_area", "launch_image"]

DEFAULT_POLICY: Final = 0x3_0000
NO_DEVICES: Final = BootDevices().tree().pack()
"""The device tree of a machine whose devices are all handed over as descriptors."""
_PIECE_PAGES: Final = 256
"""Pages in one command: a MiB stays in the processor's cache on its way through copy and digest."""
_RUNS: Final = frozenset({PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED})
_LENGTH_BYTES: Final = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Launched:
    """A guest that is ready to run."""

    digest: bytes
    """The chip's own launch digest, 48 bytes."""
    host_data: bytes
    vmsas: tuple[int, ...]
    """Addresses of the VMSAs by vp_index."""


def configuration_area(configuration: bytes, size_bytes: int) -> bytes:
    """A parameter area with the launch configuration: u32 length, the bytes, zeros.

    Raises:
        FormatError: ``host-configuration`` when it does not fit.
    """
    if len(configuration) + _LENGTH_BYTES > size_bytes:
        raise FormatError(
            "the launch configuration does not fit its area", code="host-configuration", got=len(configuration)
        )
    return (len(configuration).to_bytes(_LENGTH_BYTES, "little") + configuration).ljust(size_bytes, b"\0")


def launch_image(
    port: HardwarePort, shared_fd: int, image: IgvmFile, *, configuration: bytes, device_tree: bytes = NO_DEVICES
) -> Launched:
    """Launch `image` for SEV-SNP.

    Args:
        port: The hardware.
        shared_fd: The shared memfd; offset = GPA.
        image: A checked file.
        configuration: The launch configuration's bytes; HOST_DATA is their SHA-256.
        device_tree: A flattened device tree.

    Raises:
        FormatError: ``igvm-*``, ``host-configuration``.
        ProtocolError: ``host-psp-refused``; ``host-parameter`` for a parameter this loader cannot fill.
        BackendError: ``host-hardware``, ``host-memory``.
    """
    policy = guest_policy(image)
    policy = DEFAULT_POLICY if policy is None else policy
    areas = _fill_areas(image, configuration, device_tree)
    port.command(HostCommand.LAUNCH_START, policy)
    vmsas: dict[int, int] = {}
    for step in plan_runs(image, PlatformType.SEV_SNP, order=Order.FILE):
        if step.kind is StepKind.PARAMETER:
            area = areas[step.number]
            contents: bytes | memoryview = area[step.offset : step.offset + step.pages * PAGE_SIZE]
        elif step.kind is StepKind.CPUID and step.contents is None:
            contents = port.command(HostCommand.CPUID).payload * step.pages
        else:
            contents = bytes(step.pages * PAGE_SIZE) if step.contents is None else step.contents
        if step.kind is StepKind.VMSA:
            vmsas[step.number] = step.gpa
        view = memoryview(contents)
        for start in range(0, step.pages, _PIECE_PAGES):
            pages = min(_PIECE_PAGES, step.pages - start)
            gpa, offset = step.gpa + start * PAGE_SIZE, start * PAGE_SIZE
            _store(shared_fd, gpa, view[offset : offset + pages * PAGE_SIZE])
            if step.page_type is not None:
                _update(port, step.page_type, gpa, pages)
    host_data = hashlib.sha256(configuration).digest()
    return Launched(_finish(port, image, policy, host_data), host_data, tuple(vmsas[index] for index in sorted(vmsas)))


def _update(port: HardwarePort, page_type: PageType, gpa: int, pages: int) -> None:
    if page_type not in _RUNS and pages > 1:
        for page in range(pages):
            _update(port, page_type, gpa + page * PAGE_SIZE, 1)
        return
    arguments = (int(page_type), gpa, pages, 0)
    answer = port.ask(HostCommand.LAUNCH_UPDATE, *arguments)
    if answer.status == FirmwareStatus.INVALID_PARAM and page_type is PageType.CPUID:
        # The firmware has put the values that it accepts in the page's place; KVM's callers try once more with them.
        port.command(HostCommand.LAUNCH_UPDATE, *arguments)
    elif answer.status:
        raise ProtocolError(
            f"the hardware refused a page: {answer.payload.decode(errors='replace')}",
            code="host-psp-refused",
            status=answer.status,
            gpa=gpa,
        )


def _finish(port: HardwarePort, image: IgvmFile, policy: int, host_data: bytes) -> bytes:
    header = id_block_header(image)
    if header is None:
        return port.command(HostCommand.LAUNCH_FINISH, 0, 0, payload=host_data).payload
    block, auth = split_header(header, policy=policy)
    payload = host_data + block.pack() + auth.pack()
    return port.command(HostCommand.LAUNCH_FINISH, 1, int(bool(header.author_key_enabled)), payload=payload).payload


def _store(shared_fd: int, gpa: int, contents: memoryview) -> None:
    try:
        written = os.pwrite(shared_fd, contents, gpa)
    except OSError as error:
        raise BackendError(f"shared memory: {error.strerror}", code="host-memory", gpa=gpa) from None
    if written != len(contents):
        raise BackendError("shared memory took only a part", code="host-memory", gpa=gpa)


def _fill_areas(image: IgvmFile, configuration: bytes, device_tree: bytes) -> Mapping[int, bytes]:
    """The contents of every parameter area: the first takes the launch configuration, unless parameters live in it."""
    areas = {
        header.body.parameter_area_index: bytearray(_initial(image, header.body))
        for header in image.headers
        if isinstance(header.body, ParameterArea)
    }
    used: set[int] = set()
    for header in image.headers:
        if isinstance(header.body, Parameter):
            used.add(header.body.parameter_area_index)
            value = device_tree if header.kind is HeaderType.DEVICE_TREE else _parameter(header.kind)
            area = areas[header.body.parameter_area_index]
            end = header.body.byte_offset + len(value)
            if end > len(area):
                raise FormatError("a parameter does not fit its area", code="host-parameter", got=end)
            area[header.body.byte_offset : end] = value
    free = [index for index in sorted(areas) if index not in used]
    if free:
        areas[free[0]][:] = configuration_area(configuration, len(areas[free[0]]))
    return {index: bytes(area) for index, area in areas.items()}


def _initial(image: IgvmFile, area: ParameterArea) -> bytes:
    if area.number_of_bytes > 1 << 24:
        raise FormatError("a parameter area is too large", code="host-parameter", got=area.number_of_bytes)
    if not area.file_offset:
        return bytes(area.number_of_bytes)
    return bytes(image.data_at(area.file_offset, area.number_of_bytes, start=image.data_start))


def _parameter(kind: HeaderType) -> bytes:
    if kind is HeaderType.VP_COUNT:
        return (1).to_bytes(4, "little")
    if kind is HeaderType.ENVIRONMENT_INFO:
        return bytes(4)
    raise ProtocolError(
        f"this loader cannot fill the parameter {kind.name}",
        code="host-parameter",
        hint="the simulated machine fills VP_COUNT, ENVIRONMENT_INFO and DEVICE_TREE",
    )
