# SPDX-License-Identifier: MIT OR Apache-2.0
"""The honest host: launching, parameters, devices from listening sockets, the end of a VM as it sees it."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from svsm.abi.platform import Device, DeviceKind
from svsm.formats.boot_devices import BootDevices, VirtioMmio
from svsm.formats.errors import FormatError, ProtocolError, SvsmError
from svsm.formats.igvm import HeaderType, IgvmBuilder, IgvmFile, PageDataType, PlatformType
from svsm.formats.igvm.layout import PublicKey, Signature, SnpIdBlock
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.id_block import IdBlock, PspPublicKey, key_digest
from svsm.formats.snp.page_info import KVM_VMSA_GPA
from svsm.formats.snp.report import parse_report
from svsm.formats.snp.vmsa import Vmsa
from svsm.hardware.machine import run_hardware
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.rmp import Home
from svsm.host.hardware_port import HardwarePort
from svsm.host.hypervisor import Hypervisor, Listener
from svsm.host.launcher import configuration_area
from svsm.launch.digest import launch_digest
from svsm.testing.machine_harness import RunningMachine, running_machine, small_image, throwaway_chip

POLICY = 0x3_0000


def builder(policy: int = POLICY) -> IgvmBuilder:
    made = IgvmBuilder()
    made.platform(PlatformType.SEV_SNP)
    made.policy(policy)
    return made


def with_start(made: IgvmBuilder) -> bytes:
    made.pages(0x1_0000, b"pass\n")
    made.page(0x1000, data_type=PageDataType.SECRETS)
    made.vp_context(KVM_VMSA_GPA, Vmsa(efer=0x1000, rip=0x1_0000, rcx=5, rbx=0x1000, rsi=0x1000).pack(), vp_index=0)
    return made.finish().pack()


def wait_for_device(machine: RunningMachine) -> Device:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        machine.platform.wait(deadline=deadline)
        if (device := machine.platform.next_device()) is not None:
            return device
    raise AssertionError("no device came")


def test_host_data_is_the_digest_of_the_configuration() -> None:
    configuration = b'{"name":"vm","version":1}'
    with running_machine(configuration=configuration) as machine:
        assert machine.launched.host_data == hashlib.sha256(configuration).digest()
        area = machine.platform.read(0x4000, 0x4000)  # type: ignore[arg-type]
    assert area == configuration_area(configuration, 0x4000)
    assert area[:4] == len(configuration).to_bytes(4, "little")
    assert machine.events[0] == (
        "launched",
        {"digest": machine.launched.digest.hex(), "host_data": machine.launched.host_data.hex()},
    )


def test_the_configuration_is_not_measured() -> None:
    digests = set()
    for configuration in (b"{}", b'{"other":1}'):
        with running_machine(configuration=configuration) as machine:
            digests.add(machine.launched.digest)
    assert digests == {launch_digest(IgvmFile.parse(small_image()))}


@pytest.mark.parametrize(("length", "fits"), [(0x4000 - 4, True), (0x4000 - 3, False)])
def test_the_configuration_must_fit_its_area(length: int, fits: bool) -> None:
    assert fits == (len(b"x" * length) + 4 <= 0x4000)
    if fits:
        assert len(configuration_area(b"x" * length, 0x4000)) == 0x4000
    else:
        with pytest.raises(FormatError) as error:
            configuration_area(b"x" * length, 0x4000)
        assert error.value.code == "host-configuration"


def test_parameters_that_the_loader_fills() -> None:
    made = builder()
    made.parameter_area(0, 0x1000)
    made.parameter(HeaderType.VP_COUNT, index=0, byte_offset=0)
    made.parameter(HeaderType.ENVIRONMENT_INFO, index=0, byte_offset=4)
    made.parameter_insert(0x4000, index=0)
    with running_machine(with_start(made)) as machine:
        assert machine.machine.memory.read(Home.PRIVATE, 0x4000, 12) == bytes([1]) + bytes(11)


def test_a_device_tree_goes_where_the_image_asks_for_it_and_moves_no_digest() -> None:
    trees = [BootDevices(), BootDevices((VirtioMmio(0xFEB0_0000),), disk=VirtioMmio(0xFEB0_0000))]
    digests = []
    for tree in (devices.tree().pack() for devices in trees):
        made = builder()
        made.parameter_area(0, 0x1000)
        made.parameter(HeaderType.DEVICE_TREE, index=0, byte_offset=8)
        made.parameter_insert(0x4000, index=0)
        with running_machine(with_start(made), device_tree=tree) as machine:
            digests.append(machine.launched.digest)
            area = machine.machine.memory.read(Home.PRIVATE, 0x4000, 0x1000)
            assert area == (bytes(8) + tree).ljust(0x1000, b"\0")
    assert digests[0] == digests[1]


def test_a_device_tree_that_does_not_fit() -> None:
    made = builder()
    made.parameter_area(0, 0x1000)
    made.parameter(HeaderType.DEVICE_TREE, index=0, byte_offset=0)
    made.parameter_insert(0x4000, index=0)
    with pytest.raises(FormatError) as error, running_machine(with_start(made), device_tree=bytes(0x1001)):
        pass
    assert error.value.code == "host-parameter"


@pytest.mark.parametrize("kind", [HeaderType.MADT, HeaderType.MEMORY_MAP, HeaderType.SRAT])
def test_parameters_that_it_does_not_have(kind: HeaderType) -> None:
    made = builder()
    made.parameter_area(0, 0x1000)
    made.parameter(kind, index=0, byte_offset=0)
    made.parameter_insert(0x4000, index=0)
    with pytest.raises(ProtocolError) as error, running_machine(with_start(made)):
        pass
    assert error.value.code == "host-parameter"


def test_an_image_for_memory_that_the_machine_does_not_have() -> None:
    made = builder()
    made.page(0x2000_0000, b"x" * 4096)
    with pytest.raises(ProtocolError) as error, running_machine(with_start(made)):
        pass
    assert error.value.details["status"] == FirmwareStatus.INVALID_ADDRESS


def test_an_image_with_a_policy_that_the_platform_does_not_keep() -> None:
    with pytest.raises(ProtocolError) as error, running_machine(with_start(builder(POLICY | 1 << 22))):
        pass
    assert error.value.details["status"] == FirmwareStatus.POLICY_FAILURE


# ---- ID block ----------------------------------------------------------------------------------------------------


def id_block_of(image: bytes, *, digest: bytes | None = None, svn: int = 7) -> tuple[SnpIdBlock, bytes]:
    """An ID block header for an image of policy `POLICY`, signed by a fresh key; and that key's digest."""
    key = ec.generate_private_key(ec.SECP384R1())
    signed = IdBlock(
        digest or launch_digest(IgvmFile.parse(image)), b"F" * 16, b"I" * 16, version=1, guest_svn=svn, policy=POLICY
    )
    r, s = decode_dss_signature(key.sign(signed.pack(), ec.ECDSA(hashes.SHA384())))
    numbers = key.public_key().public_numbers()
    x, y = numbers.x.to_bytes(72, "little"), numbers.y.to_bytes(72, "little")
    header = SnpIdBlock(
        compatibility_mask=1,
        author_key_enabled=0,
        reserved_0x5=bytes(3),
        ld=signed.launch_digest,
        family_id=signed.family_id,
        image_id=signed.image_id,
        version=1,
        guest_svn=svn,
        id_key_algorithm=1,
        author_key_algorithm=0,
        id_key_signature=Signature(r.to_bytes(72, "little"), s.to_bytes(72, "little")),
        id_public_key=PublicKey(2, 0, x, y),
        author_key_signature=Signature(bytes(72), bytes(72)),
        author_public_key=PublicKey(0, 0, bytes(72), bytes(72)),
    )
    return header, key_digest(PspPublicKey(2, x, y, bytes(880)))


def with_id_block(header: SnpIdBlock) -> bytes:
    made = builder()
    made.id_block(header)
    return with_start(made)


def test_an_image_with_an_id_block() -> None:
    header, digest = id_block_of(with_start(builder()))
    with running_machine(with_id_block(header)) as machine:
        report = parse_report(machine.platform.report(bytes(64)).report)
    assert report.id_key_digest == digest
    assert (report.family_id, report.image_id, report.guest_svn) == (b"F" * 16, b"I" * 16, 7)
    assert report.author_key_digest == bytes(48)
    assert not report.author_key_enabled


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("another image", FirmwareStatus.BAD_MEASUREMENT),
        ("changed after signing", FirmwareStatus.BAD_SIGNATURE),
    ],
)
def test_an_id_block_that_does_not_hold(case: str, status: int) -> None:
    image = with_start(builder())
    header, _ = id_block_of(image, digest=bytes(48) if case == "another image" else None)
    if case != "another image":
        header = header.replace(guest_svn=8)
    with pytest.raises(ProtocolError) as error, running_machine(with_id_block(header)):
        pass
    assert error.value.details["status"] == status


def test_clients_of_listening_sockets_are_handed_over(tmp_path: Path) -> None:
    listeners = []
    for index, port in ((0, 0), (0, 1), (1, 0)):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / f"{index}.{port}"))
        sock.listen()
        listeners.append(Listener(sock, index, port))
    with running_machine(listeners=listeners) as machine:
        for index, port in ((1, 0), (0, 1), (0, 0)):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / f"{index}.{port}"))
                device = wait_for_device(machine)
                assert (device.kind, device.index, device.port) == (DeviceKind.CLIENT, index, port)
                with socket.socket(fileno=device.descriptor) as connection:
                    client.sendall(b"command")
                    assert connection.recv(16) == b"command"


def test_the_main_functions_together() -> None:
    """`run_hardware` and a `Hypervisor` as a boot has them; an image whose start is refused ends both."""
    made = builder()
    made.page(0x1000, b"x" * 4096)
    image = made.finish().pack()  # no VMSA
    memory = PhysicalMemory()
    host_side, hardware_side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host_kernel, kernel_host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = {home.value: os.dup(descriptor) for home, descriptor in memory.descriptors.items()}
    reasons: list[object] = []
    hardware = threading.Thread(
        target=lambda: reasons.append(
            run_hardware(
                hardware_side,
                None,
                throwaway_chip(),
                None,  # type: ignore[arg-type]
                memory=names,
                kernel_descriptors={"host": kernel_host.detach()},
            )
        )
    )
    hardware.start()
    port = HardwarePort(host_side)
    hypervisor = Hypervisor(port, host_kernel, memory.descriptors[Home.SHARED])
    launched = hypervisor.launch(IgvmFile.parse(image), b"{}")
    with pytest.raises(SvsmError) as error, host_kernel:
        hypervisor.start(launched)
    port.stop()
    port.close()
    assert error.value.code == "host-no-vmsa"
    hardware.join(10)
    assert len(reasons) == 1
    for descriptor in names.values():
        os.close(descriptor)
    memory.close()
