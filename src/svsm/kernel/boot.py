# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel: from the first measured line to a guest with an attested, persistent TPM.

    settings, launch configuration ─▶ serial line ─▶ attestation ─▶ key ─▶ disk ─▶ volume ─▶ TPMs ─▶ (broker: active)
                                                                                              └▶ answers, guest

Until the volume is there, one thing follows the other and every wait has a deadline. From then on one event loop
serves everybody, and nobody waits for anybody. Whatever the host does ends in one of three ways: it is served, it is
refused, or the kernel stops with a reason on its console; a refusal never becomes a fresh start.

The kernel opens nothing: what it uses arrived as named descriptors, or is handed over by the host and looked at.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable

from svsm.abi.block import BlockDevice
from svsm.abi.channel import Channel
from svsm.abi.descriptors import client_socket
from svsm.abi.errors import BackendError, IntegrityError, SvsmError
from svsm.abi.platform import Device, DeviceKind, Gpa, Platform
from svsm.abi.syscall import Endpoint, Transport
from svsm.confine.context import ProcessContext
from svsm.formats.boot_devices import BootDevices
from svsm.formats.launch_configuration import LaunchConfiguration, TpmFront, parse_area
from svsm.formats.settings import SETTINGS_BYTES, Settings
from svsm.kernel.attestation import Release, attest
from svsm.kernel.channels.stream import FramedChannel, StreamChannel
from svsm.kernel.console import Console
from svsm.kernel.decision import AlwaysYes, DecisionSource
from svsm.kernel.devices import open_channel, open_disk, read_devices
from svsm.kernel.disk import VolumeDisk, open_descriptor
from svsm.kernel.events import READ, EventLoop
from svsm.kernel.files import VolumeFiles
from svsm.kernel.guest import Guest
from svsm.kernel.processes import ProcessTable
from svsm.kernel.runtime_channel import exchange
from svsm.kernel.simulated_platform import CONFIGURATION_BYTES, DEVICE_TREE_BYTES, SimulatedPlatform
from svsm.kernel.tpm import TpmService, tpm_state_inode
from svsm.kernel.volume_birth import Action, Birth
from svsm.storage.volume import Volume

__all__ = ["Kernel", "main"]

_DEVICE_SECONDS = 30.0
_MAX_KEPT_DEVICES = 64
_ATTESTATION_SECONDS = 60.0
_TPM_SECONDS = 30.0
_LAUNCH_VMSA_GPA = Gpa(0xFFFF_FFFF_F000)
_COUNTER_BYTES = 16


def main(context: ProcessContext) -> int:
    """The entry point for the measured loader.

    Returns:
        The exit status: 0 after an orderly shutdown, else that of the error's kind.
    """
    console = Console(context.descriptors.get("console"))
    platform = SimulatedPlatform.at_start(context.registers, context.descriptors)
    kernel = Kernel(platform, console, archive=context.archive)
    try:
        settings, configuration, tree = (Gpa(context.registers[name]) for name in ("rsi", "rdi", "r9"))
        kernel.boot(settings_gpa=settings, configuration_gpa=configuration, device_tree_gpa=tree)
        kernel.serve()
    except SvsmError as error:
        console.failure(error)
        kernel.abandon()
        return error.exit_code
    return 0


class Kernel:
    """One kernel. `boot`, then `serve`.

    Args:
        platform: The hardware.
        console: Where events go.
        archive: The payload archive, for services.
    """

    def __init__(self, platform: Platform, console: Console, *, archive: int) -> None:
        self._platform = platform
        self._console = console
        self._devices: list[Device] = []
        self._loop = EventLoop()
        self._processes = ProcessTable(
            self._loop,
            lambda service, parameters: platform.spawn(service, archive, parameters),
            platform.end_service,
        )
        self._tpms: list[TpmService] = []
        self._guest: Guest | None = None
        self._source: DecisionSource = AlwaysYes()
        self._volume: Volume | None = None
        self._failure: SvsmError | None = None
        self._stopping = False

    # --- the boot, step by step ---

    def boot(self, *, settings_gpa: Gpa, configuration_gpa: Gpa, device_tree_gpa: Gpa) -> None:
        """Everything up to the point where answers may leave.

        Raises:
            SvsmError: Why this boot is refused or failed; nothing has left the kernel then.
        """
        settings = Settings.parse(self._platform.read(settings_gpa, SETTINGS_BYTES))
        configuration_json = parse_area(self._platform.read(configuration_gpa, CONFIGURATION_BYTES))
        devices = read_devices(self._platform.read(device_tree_gpa, DEVICE_TREE_BYTES))
        line = FramedChannel(self._key_channel(devices))
        self._console.event("attesting")
        release = attest(
            line,
            self._platform,
            settings=settings,
            configuration_json=configuration_json,
            deadline=time.monotonic() + _ATTESTATION_SECONDS,
        )
        self._console.event("attested", volume_id=release.configuration.volume_id, state=release.state.value)
        birth = Birth(state=release.state, session=release.session, can_report=release.runtime is not None)
        self._volume = self._open_volume(release, birth, devices)
        self._start_tpms(release.configuration, self._files(self._volume))
        if birth.must_report:
            self._report_birth(line, release, birth, self._volume)
        line.close()
        for tpm in self._tpms:
            tpm.release()
        self._start_guest(release.configuration)
        self._console.event(
            "ready",
            tpms=[
                {"name": tpm.name, "front": tpm.front, "ek_name": tpm.ek_name.hex() if tpm.ek_name else None}
                for tpm in self._tpms
            ],
        )

    def _key_channel(self, devices: BootDevices) -> Channel:
        if devices.key_channel is not None:
            return open_channel(self._platform, devices.key_channel)
        return StreamChannel(client_socket(self._device(DeviceKind.SERIAL).descriptor))

    def _device(self, kind: DeviceKind) -> Device:
        """Wait for the first device of a kind; a few others are kept for later, the rest are closed."""
        deadline = time.monotonic() + _DEVICE_SECONDS
        for kept in self._devices:
            if kept.kind is kind:
                self._devices.remove(kept)
                return kept
        # The host may offer devices without end: neither their number nor the waiting may grow with them.
        while time.monotonic() < deadline and not self._platform.host_gone:
            device = self._platform.next_device()
            if device is None:
                if self._platform.shutdown_asked:
                    break
                self._platform.take_interrupt()  # no guest runs yet that it could wake
                self._platform.wait(deadline=deadline)
            elif device.kind is kind:
                return device
            elif len(self._devices) < _MAX_KEPT_DEVICES:
                self._devices.append(device)
            else:
                device.close()
        raise BackendError(
            f"the host gives no {kind.value}",
            code="boot-device-missing",
            hint="the hypervisor must offer a serial line and a disk",
            device=kind.value,
        )

    def _open_volume(self, release: Release, birth: Birth, devices: BootDevices) -> Volume:
        if devices.disk is not None:
            device: BlockDevice = open_disk(self._platform, devices.disk, on_reset=self._disk_reset)
        else:
            device = open_descriptor(self._device(DeviceKind.DISK).descriptor)
        volume_id = release.configuration.volume_id
        disk = VolumeDisk(device, key=release.volume_key, volume_id=volume_id, source=self._source)
        action = birth.decide(disk)
        if action is Action.FORMAT:
            self._console.event("formatting", size_bytes=device.size_bytes)
            disk.format()
        if disk.volume is None:
            raise BackendError("the volume was not opened", code="boot-volume")
        self._console.event("volume", action=action.value, size_bytes=disk.volume.size_bytes)
        return disk.volume

    def _files(self, volume: Volume) -> VolumeFiles:
        later = self._loop.call_later
        return VolumeFiles(volume, source=self._source, later=later, on_failure=self._storage_failed)

    def _start_tpms(self, configuration: LaunchConfiguration, files: VolumeFiles) -> None:
        for index, wanted in enumerate(configuration.tpms):
            tpm = TpmService(
                self._processes,
                name=wanted.name,
                front="svsm" if wanted.front is TpmFront.SVSM else "socket",
                store=files,
                inode=tpm_state_inode(index),
                log=functools.partial(self._tpm_says, wanted.name),
                on_ready=functools.partial(self._tpm_ready, wanted.name),
            )
            self._tpms.append(tpm)
            tpm.start()
        ready = self._loop.run_until(
            lambda: self._failure is not None or all(tpm.ready for tpm in self._tpms), timeout_seconds=_TPM_SECONDS
        )
        if self._failure is not None:
            raise self._failure
        if not ready:
            raise BackendError("a TPM does not start", code="boot-tpm", hint="the kernel's log says why")

    def _tpm_says(self, name: str, text: str) -> None:
        self._console.event("log", tpm=name, text=text[:512])

    def _tpm_ready(self, name: str, _ek_name: bytes | None) -> None:
        self._console.event("tpm", name=name)

    def _report_birth(self, line: FramedChannel, release: Release, birth: Birth, volume: Volume) -> None:
        if release.runtime is None:
            raise IntegrityError("there is no run-time channel", code="boot-no-channel")
        message = birth.formatted(counter=volume.counter.to_bytes(_COUNTER_BYTES, "big"), root=volume.root_digest)
        deadline = time.monotonic() + _ATTESTATION_SECONDS
        birth.acknowledge(exchange(line, release.runtime, message, deadline=deadline))
        self._console.event("active", volume_id=release.configuration.volume_id)

    def _start_guest(self, configuration: LaunchConfiguration) -> None:
        owner = next((tpm for tpm in self._tpms if tpm.front == "svsm"), None)
        try:
            self._guest = Guest(self._platform, tpm=owner, launch_vmsa_gpa=_LAUNCH_VMSA_GPA)
            self._guest.start()
        except BackendError as error:
            # A machine without a vCPU for guests still serves its other TPMs.
            self._guest = None
            self._console.event("no-guest", code=error.code, message=error.message)
            return
        self._console.event("guest", tpm=owner.name if owner is not None else None)

    # --- serving ---

    def serve(self) -> None:
        """Serve until the host asks for the end, or hangs up.

        Raises:
            SvsmError: What the kernel cannot go on with.
        """
        self._loop.register(self._platform, READ, lambda _ready: self._guarded(self._hardware_event))
        self._guarded(self._hardware_event)
        while not self._stopping:
            self._loop.run_once(None)
        self._finish()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SvsmError as error:
            self._failure = error
            self._stopping = True

    def _hardware_event(self) -> None:
        # A few: the host may offer faster than anybody takes, and the others get their turn.
        while len(self._devices) < _MAX_KEPT_DEVICES and (device := self._platform.next_device()) is not None:
            self._devices.append(device)
        waiting, self._devices = self._devices, []
        for device in waiting:
            self._take_device(device)
        self._platform.ended_services()
        if self._guest is not None:
            self._serve_guest(self._guest)
        if self._platform.shutdown_asked or self._platform.host_gone:
            self._stopping = True

    def _serve_guest(self, guest: Guest) -> None:
        try:
            guest.on_hardware_event()
        except BackendError as error:
            self._guest = None
            self._console.event("no-guest", code=error.code, message=error.message)
            return
        if guest.stopped is not None:
            self._guest = None
            self._console.event("guest-stopped", reason=guest.stopped)

    def _take_device(self, device: Device) -> None:
        if device.kind is not DeviceKind.CLIENT or device.index >= len(self._tpms):
            device.close()
            return
        endpoint = Endpoint.DATA if device.port else Endpoint.CONTROL
        try:
            self._tpms[device.index].connect(device.descriptor, endpoint, _transport(device.descriptor))
        except SvsmError as error:
            self._console.event("client-refused", code=error.code, tpm=self._tpms[device.index].name)

    def _disk_reset(self, code: str) -> None:
        self._console.event("disk-reset", code=code, message="the disk asked for a reset, and got it")

    def _storage_failed(self, error: SvsmError) -> None:
        self._console.event("storage-failed", code=error.code, message=error.message)
        if self._volume is not None and self._volume.failed:
            self._failure = error
            self._stopping = True

    def _finish(self) -> None:
        """TPM2_Shutdown in every TPM, then the volume; whatever happens, an acknowledged write is durable already."""
        left = len(self._tpms)

        def stopped() -> None:
            nonlocal left
            left -= 1

        if self._failure is None:
            for tpm in self._tpms:
                tpm.stop(stopped)
            self._loop.run_until(lambda: left == 0, timeout_seconds=_TPM_SECONDS)
        self.abandon()
        if self._failure is not None:
            raise self._failure
        self._console.event("stopped")

    def abandon(self) -> None:
        """Take everything away at once."""
        self._processes.end_all()
        if self._volume is not None:
            self._volume.close()
            self._volume = None


def _transport(descriptor: int) -> Transport:
    """How a client is connected, by the descriptor itself; what is no socket is refused where it is taken."""
    try:
        probe = socket.socket(fileno=descriptor)
    except OSError:
        return Transport.UNIX
    family = probe.family
    probe.detach()  # looked at only; a duplicate would have to be closed on every way out
    return Transport.UNIX if family == socket.AF_UNIX else Transport.TCP
