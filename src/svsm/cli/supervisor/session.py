# SPDX-License-Identifier: MIT OR Apache-2.0
"""One boot, in order: image, machine, broker and proxy, then the VM; and what follows until it stops.

The supervisor makes every descriptor, gives it to the role that shall hold it and closes its own copy. After that it
reads event lines and waits. The chip's own launch digest is compared with the one computed from the file; the broker
enrols the digest only when it creates the volume's row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from pathlib import Path

from svsm.cli.supervisor import bodies
from svsm.cli.supervisor.bodies import HostDevices
from svsm.cli.supervisor.demonstration import guest_random, socket_random
from svsm.cli.supervisor.disk import Disk, DiskKind, device_body, front_body
from svsm.cli.supervisor.image import Image, image_body
from svsm.cli.supervisor.progress import Progress
from svsm.cli.supervisor.qemu_disk import KINDS as QEMU_KINDS
from svsm.cli.supervisor.qemu_disk import qemu_body
from svsm.cli.supervisor.release import Release, last_release, remember, what_changed
from svsm.cli.supervisor.sockets import BACKLOG, listen, tcp_pair
from svsm.cli.supervisor.state import StateDirectory
from svsm.cli.supervisor.watch import Watch
from svsm.formats.errors import IntegrityError, StateError
from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront
from svsm.host.devices.key_channel import KeyChannel
from svsm.host.qemu_command import find_qemu

__all__ = ["Options", "Session"]

_START_SECONDS = 90.0
_STOP_SECONDS = 15.0
_DISK_BYTES = 8 << 20
_TPMS = (TpmConfiguration("vtpm0", TpmFront.SOCKET), TpmConfiguration("guest0", TpmFront.SVSM))
_ALLOW = "svsm broker volume allow"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `svsm boot` was asked for."""

    state: Path
    image: Path | None = None
    broker: str | None = None
    broker_key: Path | None = None
    serial: Path | None = None
    disk: Disk | DiskKind = DiskKind.FILE
    """A disk somewhere, or how the state's own file is served."""
    channel: KeyChannel = KeyChannel.STREAM
    """What the key comes over, where the disk is a file of the device role's."""
    tcp_port: int | None = None
    landlock_cap: int | None = None
    debug: bool = False


class Session:
    """One instance, from its start to its end.

    Args:
        options: What was asked for.
        progress: Where to report.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._watch = Watch(progress, debug=options.debug, complete_hint=self._complete_hint)
        self._ready: dict[str, object] = {}
        self._is_ready = False
        self._power: socket.socket | None = None
        self._minting_seconds = 0.0
        self._release: Release | None = None
        self._broker_url = ""
        kind = options.disk.kind if isinstance(options.disk, Disk) else options.disk
        self._is_qemu = kind in QEMU_KINDS

    def run(self) -> int:
        """Boot, serve, stop.

        Returns:
            0 after an orderly stop.

        Raises:
            SvsmError: Why it did not boot, or ended.
        """
        program = find_qemu() if self._is_qemu else ""
        state = StateDirectory.open_for_boot(self._options.state)
        started = time.monotonic()
        self._watch.catch_signals()
        try:
            self._boot(state, program)
            boot_ms = round((time.monotonic() - started - self._minting_seconds) * 1000)
            self._announce(state, boot_ms)
            self._serve()
        finally:
            self._tear_down()
        if self._watch.failure is not None:
            raise self._watch.failure
        self._progress.event("stopped")
        return 0

    # --- boot ---

    def _boot(self, state: StateDirectory, qemu: str) -> None:
        progress = self._progress
        image_started = self._start_image()
        machine_root = self._machine(state)
        with progress.step("image", "Image"):
            bodies.preload(bodies.BROKER_MODULES)
            broker_key = self._start_broker(state)
            image = self._image(image_started, broker_key)
            if self._release is not None and (change := what_changed(last_release(state.path), self._release)):
                progress.note(change)
        configuration = LaunchConfiguration(volume_id=str(state.volume_id), name=state.name, tpms=_TPMS)
        with progress.step("services", "Broker and proxy"):
            self._enrol(configuration, machine_root, image.launch_digest)
            serial = self._start_proxy(state)
        with progress.step("machine", "Simulated SEV-SNP machine"):
            fronts, tcti = self._fronts(state)
            driver = listen(state.folder("run") / "guest.sock")
            disk = self._options.disk
            if not isinstance(disk, Disk):
                disk = Disk(state.folder("host") / "disk.img", disk, create_bytes=_DISK_BYTES)
            channel = self._options.channel
            devices = HostDevices(serial=serial, disk=disk, fronts=fronts, guest_driver=driver, channel=channel)
            self._start_machine(state, image, configuration, devices, qemu)
            chip_digest = str(self._watch.await_event("host-launched")["digest"])
            if chip_digest != image.launch_digest:
                raise IntegrityError(
                    "the chip measured something else than the file says",
                    code="boot-digest",
                    hint="the image was altered between measuring and launching",
                    expected=image.launch_digest,
                    got=chip_digest,
                )
            progress.fact("chip_digest", "equals the launch digest computed from the file", label="chip")
        self._watch.dismiss("image")
        self._kernel_steps()
        self._ready = {
            "tcti": tcti,
            "launch_digest": image.launch_digest,
            "payload_digest": image.payload_digest,
            **self._tpm_names(),
            "volume_id": str(state.volume_id),
            "broker": self._options.broker or self._broker_url or None,
            "guest_socket": str(state.folder("run") / "guest.sock") if "guest" in self._watch.facts else None,
        }
        self._demonstrate(state)

    def _machine(self, state: StateDirectory) -> str:
        from svsm.hardware.machine_store import root_fingerprint

        folder = state.folder("machine")
        if not any(folder.iterdir()):
            begun = time.monotonic()
            with self._progress.step("mint", "Minting the simulated machine (first boot only)"):
                # In a process of its own: roles are forks of this one, and a hijacked host would find what it has seen.
                self._watch.run("mint", bodies.mint_body(folder))
            self._minting_seconds = time.monotonic() - begun
        return root_fingerprint(folder).hex()

    def _start_broker(self, state: StateDirectory) -> bytes:
        if self._options.broker is not None or self._options.serial is not None:
            if self._options.image is not None:
                return b""
            if self._options.broker_key is None:
                raise StateError(
                    "an image for somebody else's broker must pin its key",
                    code="boot-broker-key",
                    hint="give --broker-key PEM, or --image FILE with an image that pins it",
                )
            from svsm.cli.igvm import read_broker_key

            return read_broker_key(self._options.broker_key)
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._broker_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._enrolment, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener, theirs:
            body = bodies.broker_body(state.folder("broker"), listener, theirs, landlock_cap=self._options.landlock_cap)
            self._watch.start("broker", body, [listener.fileno(), theirs.fileno()])
        return bytes.fromhex(str(self._watch.await_event("broker")["public_key"]))

    def _start_image(self) -> tuple[int, int]:
        """Start the worker that makes the image; gives the pipe for the broker's key, and the image's memfd."""
        key_reader, key_writer = os.pipe2(os.O_CLOEXEC)
        output = os.memfd_create("svsm-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._watch.start("image", image_body(self._options.image, key_reader, output), [key_reader, output])
        os.close(key_reader)
        return key_writer, output

    def _image(self, started: tuple[int, int], broker_key: bytes) -> Image:
        """Tell the worker the key, import what the machine's roles need meanwhile, and have the image."""
        key_writer, output = started
        with contextlib.suppress(BrokenPipeError):  # an image from a file is made without it
            os.write(key_writer, broker_key)
        os.close(key_writer)
        bodies.preload(bodies.MACHINE_MODULES)
        image = Image.of(output, self._watch.await_event("image"))
        self._release = image.release
        progress = self._progress
        progress.fact("image_bytes", f"{image.size_bytes:,} bytes", label="image")
        progress.fact("payload_digest", image.payload_digest, label="payload digest")
        progress.fact("launch_digest", image.launch_digest, label="launch digest")
        return image

    def _enrol(self, configuration: LaunchConfiguration, root: str, digest: str) -> None:
        progress = self._progress
        if not self._broker_url:
            progress.fact("broker", self._options.broker or "behind the proxy")
            return
        request = {
            "configuration": configuration.to_json().hex(),
            "root": f"simulated:{root}",
            "launch_digest": digest,
        }
        self._enrolment.send(json.dumps(request).encode())
        self._enrolment.settimeout(_START_SECONDS)
        answer = json.loads(self._enrolment.recv(1 << 16))
        if "error" in answer:
            raise StateError(answer["message"], code=answer["error"])
        progress.fact("broker", self._broker_url)
        row = "created, launch digest allowed" if answer["created"] else "known"
        progress.fact("volume", f"{configuration.volume_id} ({row}, {answer['state']})")

    def _start_proxy(self, state: StateDirectory) -> Path:
        if self._options.serial is not None:
            self._progress.fact("serial", str(self._options.serial))
            return self._options.serial
        path = state.folder("run") / "serial.sock"
        with listen(path) as listener:
            body = bodies.proxy_body(
                listener, self._options.broker or self._broker_url, landlock_cap=self._options.landlock_cap
            )
            self._watch.start("proxy", body, [listener.fileno()])
        self._progress.fact("serial", str(path))
        return path

    def _fronts(self, state: StateDirectory) -> tuple[tuple[tuple[socket.socket, int, int], ...], str]:
        data = state.folder("run") / f"{_TPMS[0].name}.sock"
        control = data.with_name(data.name + ".ctrl")
        fronts = [(listen(data), 0, 1), (listen(control), 0, 0)]
        if self._options.tcp_port is not None:
            pair = tcp_pair(self._options.tcp_port)
            fronts += [(pair[0], 0, 1), (pair[1], 0, 0)]
            self._watch.facts["tcp"] = {"port": pair[0].getsockname()[1]}
        return tuple(fronts), f"swtpm:path={data}"

    def _start_machine(
        self, state: StateDirectory, image: Image, configuration: LaunchConfiguration, devices: HostDevices, qemu: str
    ) -> None:
        from svsm.hardware.memory import PhysicalMemory

        with contextlib.ExitStack() as mine:
            memory = {home.value: fd for home, fd in PhysicalMemory().descriptors.items()}
            for descriptor in memory.values():
                mine.callback(os.close, descriptor)

            def pair(kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> tuple[socket.socket, socket.socket]:
                left, right = socket.socketpair(socket.AF_UNIX, kind)
                mine.enter_context(left)
                mine.enter_context(right)
                return left, right

            host_hardware, hardware_host = pair()
            host_kernel, kernel_host = pair()
            hardware_vcpu, vcpu_hardware = pair()
            self._power, host_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            mine.enter_context(host_control)
            kernel_console = self._watch.kernel_console(mine)
            service_console = self._watch.service_console(mine)
            cap = self._options.landlock_cap
            guest = self._watch.runs_guests = _has_unicorn()
            self._watch.start(
                "hardware",
                bodies.hardware_body(
                    state.folder("machine"),
                    hardware_host,
                    hardware_vcpu if guest else None,
                    memory,
                    {"host": kernel_host.fileno()},
                    console=kernel_console,
                    service_console=service_console,
                    tpms=len(_TPMS),
                    landlock_cap=cap,
                ),
                [
                    *memory.values(),
                    hardware_host.fileno(),
                    hardware_vcpu.fileno(),
                    kernel_host.fileno(),
                    kernel_console,
                    service_console,
                ],
            )
            if guest:
                vcpu = bodies.vcpu_body(vcpu_hardware, vmpl2=memory["vmpl2"], shared=memory["shared"], landlock_cap=cap)
                self._watch.start("vcpu", vcpu, [vcpu_hardware.fileno(), memory["vmpl2"], memory["shared"]])
            else:
                self._progress.note("no guest runs: the optional package unicorn is missing (pip install svsm[guest])")
            if devices.disk.has_role:
                host_device, device_host = pair(socket.SOCK_STREAM if self._is_qemu else socket.SOCK_SEQPACKET)
                self._start_device(devices, device_host, memory["shared"], qemu)
                devices = dataclasses.replace(devices, registers=host_device)
            self._watch.start(
                "host",
                bodies.host_body(
                    host_hardware,
                    host_kernel,
                    memory["shared"],
                    image.descriptor,
                    configuration.to_json(),
                    devices,
                    host_control,
                    landlock_cap=cap,
                ),
                [
                    host_hardware.fileno(),
                    host_kernel.fileno(),
                    memory["shared"],
                    image.descriptor,
                    host_control.fileno(),
                    *(sock.fileno() for sock in devices.sockets),
                ],
            )
            os.close(image.descriptor)
            for sock in devices.sockets:
                sock.close()

    def _start_device(self, devices: HostDevices, channel: socket.socket, shared: int, qemu: str) -> None:
        """The disk's own process."""
        disk, cap = devices.disk, self._options.landlock_cap
        keep = [channel.fileno(), shared]
        messages = None
        if self._is_qemu:
            messages = os.memfd_create("svsm-qemu-messages", os.MFD_CLOEXEC)
            keep.append(messages)
            body = qemu_body(
                disk,
                program=qemu,
                qtest=channel,
                shared=shared,
                serial=devices.serial,
                messages=messages,
                landlock_cap=cap,
            )
        elif disk.kind is DiskKind.VHOST_USER:
            body = front_body(disk, channel, shared, landlock_cap=cap)
        else:
            key = (devices.channel, devices.serial)
            body = device_body(disk, channel, shared, key=key, landlock_cap=cap)
        self._watch.start("device", body, keep, messages=messages)

    def _kernel_steps(self) -> None:
        progress = self._progress
        with progress.step("attestation", "Attestation"):
            self._watch.await_event("confined")
            attested = self._watch.await_event("attested")
            progress.fact("key", f"released for volume {attested['volume_id']} ({attested['state']})")
        with progress.step("volume", "Volume"):
            volume = self._watch.await_event("volume")
            made = "formatted, because the broker says it is new" if volume["action"] == "format" else "opened"
            progress.fact("cocoonfs", f"{made}, {int(str(volume['size_bytes'])):,} bytes", label="CocoonFS")
        with progress.step("tpms", "TPMs"):
            self._watch.await_event("ready")
            for tpm in self._tpms():
                front = "socket" if tpm["front"] == "socket" else "SVSM protocol, VMPL2 guest"
                progress.fact(str(tpm["name"]), f"{front}, EK name {tpm['ek_name']}")
            if "active" in self._watch.facts:
                progress.fact("active", "the broker has acknowledged the first format", label="volume")

    def _tpms(self) -> list[dict[str, object]]:
        tpms = self._watch.facts["ready"].get("tpms")
        return [tpm for tpm in tpms if isinstance(tpm, dict)] if isinstance(tpms, list) else []

    def _tpm_names(self) -> dict[str, object]:
        names = {str(tpm["front"]): tpm["ek_name"] for tpm in self._tpms()}
        return {"ek_name": names.get("socket"), "guest_ek_name": names.get("svsm")}

    def _demonstrate(self, state: StateDirectory) -> None:
        progress = self._progress
        with progress.step("demonstration", "One real TPM operation each"):
            random = socket_random(state.folder("run") / f"{_TPMS[0].name}.sock")
            progress.fact("socket_random", f"TPM2_GetRandom: {random.hex()}", label=_TPMS[0].name)
            if "guest" in self._watch.facts:
                random = guest_random(state.folder("run") / "guest.sock")
                progress.fact("guest_random", f"TPM2_GetRandom, called by the guest: {random.hex()}", label="guest0")

    def _announce(self, state: StateDirectory, boot_ms: int) -> None:
        progress = self._progress
        event = {**self._ready, "boot_ms": boot_ms, "isolation": {"reduced": sorted(self._watch.reduced)}}
        if "tcp" in self._watch.facts:
            event["tcti_tcp"] = f"swtpm:host=127.0.0.1,port={self._watch.facts['tcp']['port']}"
        if self._release is not None:
            remember(state.path, self._release)
        ready = state.folder("run") / f".ready.{secrets.token_hex(4)}"
        ready.write_text(json.dumps(event) + "\n", encoding="utf-8")
        ready.rename(state.folder("run") / "ready.json")
        for reduction in sorted(self._watch.reduced):
            progress.note(f"isolation is reduced here: {reduction}")
        progress.fact("ready", f"in {boot_ms} ms; try: tpm2_getrandom -T {self._ready['tcti']} --hex 8")
        progress.fact("stop", "Ctrl-C, or svsm stop")
        progress.event("ready", **event)  # the last of the start

    # --- the end ---

    def _serve(self) -> None:
        self._is_ready = True
        while not self._watch.stop_asked and self._watch.failure is None:
            self._watch.poll(None)
        if self._watch.failure is None:
            self._progress.event("stopping")

    def _tear_down(self) -> None:
        """End every role: the VM in order if it still runs, the others after it."""
        # Before it was ready nothing was acknowledged to anybody, and the kernel may be waiting for a silent host.
        in_order = self._watch.stop_asked and self._watch.failure is None and self._is_ready
        self._watch.stop_asked = True
        if self._power is not None:
            self._power.close()
        # QEMU does not end when the host hangs up; what was flushed is in the file, and it holds nothing else.
        machine = ("host", "hardware", "vcpu") if self._is_qemu else ("host", "hardware", "vcpu", "device")
        self._watch.end(machine, seconds=_STOP_SECONDS if in_order else 1.0)
        with contextlib.suppress(FileNotFoundError):
            (self._options.state / "run" / "ready.json").unlink()

    def _complete_hint(self, hint: str) -> str:
        """The kernel knows the volume and its digest, but not where this broker keeps its state."""
        return hint.replace(_ALLOW, f"{_ALLOW} --state {self._options.state}") if self._broker_url else hint


def _has_unicorn() -> bool:
    from importlib.util import find_spec

    return find_spec("unicorn") is not None
