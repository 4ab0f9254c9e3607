# SPDX-License-Identifier: MIT OR Apache-2.0
"""What each role does once it is forked: take its uid, confine itself, serve.

The order inside is the same everywhere: what needs the file system or privileges first, then `enter`, then the first
byte from outside. `preload` imports what the roles will need, in the supervisor, so that all of them share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import mmap
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.supervisor.disk import Disk
from svsm.cli.supervisor.qemu_disk import KINDS as QEMU_KINDS
from svsm.cli.supervisor.roles import Emit
from svsm.cli.supervisor.sockets import connect_serial
from svsm.confine import PathRule, enter
from svsm.confine.identity import role_uid
from svsm.confine.lists import Role
from svsm.host.devices.key_channel import KeyChannel

if TYPE_CHECKING:
    from svsm.broker.service import Broker
    from svsm.host.attachment import Attachment
    from svsm.host.hypervisor import DeviceOffer, Hypervisor
    from svsm.host.launcher import Launched

__all__ = [
    "BROKER_MODULES",
    "MACHINE_MODULES",
    "HostDevices",
    "broker_body",
    "hardware_body",
    "host_body",
    "mint_body",
    "preload",
    "proxy_body",
    "vcpu_body",
]

_BUFFER_BYTES = 1 << 16


BROKER_MODULES = (
    "encodings.idna",
    "encodings.latin_1",
    "sqlite3",
    "ssl",
    "stringprep",
    "traceback",
    "svsm.broker.app",
    "svsm.broker.service",
)
"""What the broker needs."""

MACHINE_MODULES = (
    "svsm.hardware.machine",
    "svsm.hardware.machine_store",
    "svsm.hardware.processes",
    "svsm.hardware.vcpu",
    "svsm.host.attachment",
    "svsm.host.devices.guest_driver",
    "svsm.host.devices.vhost_user_front",
    "svsm.host.devices.virtio_process",
    "svsm.host.hypervisor",
    "svsm.host.proxy",
)
"""What the others need on top."""


def preload(names: Sequence[str]) -> None:
    """Import what the roles need while the file system is there."""
    for name in names:
        importlib.import_module(name)


def _enter_folder(folder: Path, uid: int | None) -> str:
    """Make `folder` all that is left of the file system where that is possible; its path from then on."""
    if uid is None:
        return str(folder)
    for entry in [folder, *folder.iterdir()]:
        os.chown(entry, uid, uid, follow_symlinks=False)
    os.chroot(folder)
    os.chdir("/")
    return "/"


def broker_body(
    folder: Path, listener: socket.socket, control: socket.socket, *, landlock_cap: int | None
) -> Callable[[Emit, int], None]:
    """The embedded broker: serves HTTP on `listener`, enrols on `control` (one JSON request per packet)."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.broker.app import serve
        from svsm.broker.service import Broker

        uid = role_uid(Role.BROKER)
        path = _enter_folder(folder, uid)
        isolation = enter(
            Role.BROKER,
            uid=uid,
            landlock_rules=[PathRule(path, write=True)],
            tcp=True,
            parent=supervisor,
            landlock_cap=landlock_cap,
        )
        broker = Broker.open(path)
        emit("broker", public_key=broker.public_key.hex(), isolation=isolation.as_json())
        server = serve(broker, listener)
        server.start()
        while True:
            data = control.recv(_BUFFER_BYTES)
            if not data:
                break
            control.send(json.dumps(_enrol(broker, json.loads(data))).encode())
        server.stop()
        broker.close()

    return body


def _enrol(broker: Broker, request: Mapping[str, str]) -> dict[str, object]:
    """Create the volume's row if there is none; a digest is allowed only then, by the owner otherwise."""
    from svsm.formats.errors import StateError, SvsmError
    from svsm.formats.launch_configuration import LaunchConfiguration

    configuration = LaunchConfiguration.parse(bytes.fromhex(request["configuration"]))
    try:
        row = broker.volume(configuration.volume_id)
        created = False
    except StateError:
        try:
            row = broker.create_volume(
                configuration, root=request["root"], allowed=[bytes.fromhex(request["launch_digest"])]
            )
        except SvsmError as error:
            return {"error": error.code, "message": str(error)}
        created = True
    return {"created": created, "state": row.state.value}


class _EventHandler(logging.Handler):
    """Log records as events of the role."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit("proxy-log", text=record.getMessage()[:512])


def _log_to(emit: Emit) -> None:
    """Let the supervisor hear why a connection ended: the kernel only sees that it did."""
    log = logging.getLogger("svsm.host.proxy")
    log.propagate = False
    log.addHandler(_EventHandler(emit))


def proxy_body(listener: socket.socket, url: str, *, landlock_cap: int | None) -> Callable[[Emit, int], None]:
    """The proxy between the serial socket and the broker."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.host.proxy import serve

        rules = [PathRule(path) for path in ("/etc/ssl", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")]
        isolation = enter(
            Role.PROXY,
            uid=role_uid(Role.PROXY),
            landlock_rules=rules,
            tcp=True,
            parent=supervisor,
            landlock_cap=landlock_cap,
        )
        emit("proxy", isolation=isolation.as_json())
        _log_to(emit)
        serve(listener, url)

    return body


def mint_body(folder: Path) -> Callable[[Emit, int], None]:
    """Mint the machine. The authority's keys and the chip's never enter the memory that roles are forked from."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.confine.process import bind_to_parent, harden
        from svsm.hardware.machine_store import mint

        del emit
        harden()
        bind_to_parent(supervisor)
        mint(folder)

    return body


def hardware_body(
    folder: Path,
    host: socket.socket,
    vcpu: socket.socket | None,
    memory: Mapping[str, int],
    kernel_descriptors: Mapping[str, int],
    *,
    console: int,
    service_console: int,
    tpms: int,
    landlock_cap: int | None,
) -> Callable[[Emit, int], None]:
    """The chip.

    Args:
        console: The kernel's event lines.
        service_console: The services': a hijacked one must not speak for the kernel.
    """

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.hardware.machine import run_hardware
        from svsm.hardware.machine_store import load_machine
        from svsm.hardware.processes import ConfinedProcesses
        from svsm.hardware.spawn import start_spawner

        spawner = start_spawner()
        chip = load_machine(folder).chip()
        # Twice as many as there are TPMs: one that was started again may wait for its predecessor's end.
        service_uids = [role_uid(Role.SERVICE, number) for number in range(2 * tpms)]
        processes = ConfinedProcesses(
            spawner,
            kernel_uid=role_uid(Role.KERNEL),
            service_uids=[uid for uid in service_uids if uid is not None],
            console=service_console,
            landlock_cap=landlock_cap,
        )
        isolation = enter(Role.HARDWARE, uid=role_uid(Role.HARDWARE), parent=supervisor, landlock_cap=landlock_cap)
        emit("hardware", isolation=isolation.as_json())
        reason = run_hardware(
            host,
            vcpu,
            chip,
            processes,
            memory=memory,
            kernel_descriptors={**kernel_descriptors, "console": console},
        )
        emit("hardware-ended", reason=reason.value)

    return body


def vcpu_body(sock: socket.socket, *, vmpl2: int, shared: int, landlock_cap: int | None) -> Callable[[Emit, int], None]:
    """The process that executes guest code."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.hardware.vcpu import load_engine, run_vcpu

        load_engine()
        isolation = enter(Role.VCPU, uid=role_uid(Role.VCPU), parent=supervisor, landlock_cap=landlock_cap)
        emit("vcpu", isolation=isolation.as_json())
        run_vcpu(sock, vmpl2_fd=vmpl2, shared_fd=shared)

    return body


@dataclasses.dataclass(frozen=True, slots=True)
class HostDevices:
    """What the host offers to the VM."""

    serial: Path
    """The proxy's listening socket."""
    disk: Disk
    """What to hand over, where it has no device role."""
    fronts: tuple[tuple[socket.socket, int, int], ...]
    """Listening sockets: (socket, TPM index, port: 0 control, 1 data)."""
    guest_driver: socket.socket | None
    """Listening: who connects makes the guest do SVSM calls."""
    registers: socket.socket | None = None
    """The channel to the device role."""
    channel: KeyChannel = KeyChannel.STREAM
    """What the key comes over; QEMU's is always its COM3."""

    @property
    def sockets(self) -> list[socket.socket]:
        """What the role keeps of it."""
        optional = [self.guest_driver, self.registers]
        return [front[0] for front in self.fronts] + [sock for sock in optional if sock is not None]


def host_body(
    hardware: socket.socket,
    kernel: socket.socket,
    shared: int,
    image: int,
    configuration: bytes,
    devices: HostDevices,
    control: socket.socket,
    *,
    landlock_cap: int | None,
) -> Callable[[Emit, int], None]:
    """The hypervisor: the attacker's seat. `image` is a memfd, which is closed once it is launched."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.formats.boot_devices import BootDevices
        from svsm.formats.errors import SvsmError
        from svsm.host.devices.guest_driver import GuestDriver
        from svsm.host.hardware_port import HardwarePort
        from svsm.host.hypervisor import Hypervisor, Listener

        attachment = _attachment(devices, shared)
        offers = _offers(devices, attachment)
        isolation = enter(Role.HOST, uid=role_uid(Role.HOST), tcp=True, parent=supervisor, landlock_cap=landlock_cap)
        emit("host", isolation=isolation.as_json())
        port = HardwarePort(hardware)
        hypervisor = Hypervisor(
            port,
            kernel,
            shared,
            listeners=[Listener(*front) for front in devices.fronts],
            mmio=None if attachment is None else attachment.relay,
            notify=lambda name, details: emit(f"host-{name}", **details),
        )
        try:
            tree = (BootDevices() if attachment is None else attachment.devices).tree().pack()
            launched = _launch(hypervisor, image, configuration, tree)
            for offer in offers:
                hypervisor.offer(offer)
            hypervisor.start(launched)
        except SvsmError:
            port.stop()
            raise
        if devices.guest_driver is not None:
            GuestDriver(devices.guest_driver, shared, hypervisor.interrupt).start()
        threading.Thread(target=_obey, args=(control, hypervisor.shutdown), daemon=True).start()
        hypervisor.serve()

    return body


def _attachment(devices: HostDevices, shared: int) -> Attachment | None:
    """The devices behind registers, if there are any."""
    from svsm.host.attachment import attach_process, attach_qemu

    if devices.registers is None:
        return None
    kind = QEMU_KINDS.get(devices.disk.kind)
    if kind is not None:
        return attach_qemu(kind, devices.registers, shared)
    return attach_process(devices.registers, shared, key_channel=devices.channel)


def _offers(devices: HostDevices, attachment: Attachment | None) -> list[DeviceOffer]:
    """The descriptors for the kernel: what of serial line and disk is not behind registers."""
    from svsm.formats.snp.ghcb import DeviceKind
    from svsm.host.hypervisor import DeviceOffer

    offers = []
    if attachment is None or attachment.devices.key_channel is None:
        offers.append(DeviceOffer(DeviceKind.SERIAL, connect_serial(devices.serial)))
    if attachment is None:
        offers.append(DeviceOffer(DeviceKind.DISK, devices.disk.open()))
    return offers


def _launch(hypervisor: Hypervisor, image: int, configuration: bytes, device_tree: bytes) -> Launched:
    """Launch the image that a memfd holds; afterwards it is neither mapped nor open here."""
    from svsm.formats.igvm import IgvmFile

    # Private, because before Linux 6.7 a sealed memfd cannot be mapped shared, not even to be read.
    mapped = mmap.mmap(image, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(image)
    return hypervisor.launch(IgvmFile.parse(memoryview(mapped)), configuration, device_tree)


def _obey(control: socket.socket, shutdown: Callable[[], None]) -> None:
    """Press the power button when the supervisor says so, or is gone."""
    with contextlib.suppress(OSError):
        control.recv(1)
    shutdown()
