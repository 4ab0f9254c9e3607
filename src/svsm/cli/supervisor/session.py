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
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from svsm.cli.supervisor import bodies
from svsm.cli.supervisor.bodies import Disk, HostDevices
from svsm.cli.supervisor.demonstration import guest_random, socket_random
from svsm.cli.supervisor.image import Image, image_body
from svsm.cli.supervisor.progress import Progress
from svsm.cli.supervisor.release import Release, last_release, remember, what_changed
from svsm.cli.supervisor.roles import EventPipe, Role, printable, start_role
from svsm.cli.supervisor.state import StateDirectory
from svsm.formats.errors import BackendError, IntegrityError, PolicyError, StateError, SvsmError
from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront

__all__ = ["Options", "Session"]

_START_SECONDS = 90.0
_STOP_SECONDS = 15.0
_DISK_BYTES = 8 << 20
_TPMS = (TpmConfiguration("vtpm0", TpmFront.SOCKET), TpmConfiguration("guest0", TpmFront.SVSM))
_BACKLOG = 16
_ALLOW = "svsm broker volume allow"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `svsm boot` was asked for."""

    state: Path
    image: Path | None = None
    broker: str | None = None
    broker_key: Path | None = None
    serial: Path | None = None
    disk: Disk | None = None
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
        self._roles: dict[str, Role] = {}
        self._selector = selectors.DefaultSelector()
        self._ready: dict[str, object] = {}
        self._facts: dict[str, dict[str, object]] = {}
        self._runs_guests = False
        self._reduced: set[str] = set()
        self._failure: SvsmError | None = None
        self._stop_asked = False
        self._is_ready = False
        self._power: socket.socket | None = None
        self._consoles: list[tuple[EventPipe, Callable[[dict[str, object]], None]]] = []
        self._minting_seconds = 0.0
        self._release: Release | None = None

    def run(self) -> int:
        """Boot, serve, stop.

        Returns:
            0 after an orderly stop.

        Raises:
            SvsmError: Why it did not boot, or ended.
        """
        state = StateDirectory.open_for_boot(self._options.state)
        started = time.monotonic()
        self._catch_signals()
        try:
            self._boot(state)
            boot_ms = round((time.monotonic() - started - self._minting_seconds) * 1000)
            self._announce(state, boot_ms)
            self._serve()
        finally:
            self._tear_down()
        if self._failure is not None:
            raise self._failure
        self._progress.event("stopped")
        return 0

    # --- boot ---

    def _boot(self, state: StateDirectory) -> None:
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
            driver = _listen(state.folder("run") / "guest.sock")
            disk = self._options.disk or Disk(
                state.folder("host") / "disk.img", process=False, create_bytes=_DISK_BYTES
            )
            devices = HostDevices(serial=serial, disk=disk, fronts=fronts, guest_driver=driver)
            self._start_machine(state, image, configuration, devices)
            chip_digest = str(self._await("host-launched")["digest"])
            if chip_digest != image.launch_digest:
                raise IntegrityError(
                    "the chip measured something else than the file says",
                    code="boot-digest",
                    hint="the image was altered between measuring and launching",
                    expected=image.launch_digest,
                    got=chip_digest,
                )
            progress.fact("chip_digest", "equals the launch digest computed from the file", label="chip")
        self._dismiss("image")
        self._kernel_steps()
        self._ready = {
            "tcti": tcti,
            "launch_digest": image.launch_digest,
            "payload_digest": image.payload_digest,
            **self._tpm_names(),
            "volume_id": str(state.volume_id),
            "broker": self._options.broker or self._broker_url or None,
            "guest_socket": str(state.folder("run") / "guest.sock") if "guest" in self._facts else None,
        }
        self._demonstrate(state)

    def _machine(self, state: StateDirectory) -> str:
        from svsm.hardware.machine_store import root_fingerprint

        folder = state.folder("machine")
        if not any(folder.iterdir()):
            begun = time.monotonic()
            with self._progress.step("mint", "Minting the simulated machine (first boot only)"):
                self._mint(folder)
            self._minting_seconds = time.monotonic() - begun
        return root_fingerprint(folder).hex()

    def _mint(self, folder: Path) -> None:
        """In a process of its own: roles are forks of this one, and what it has seen a hijacked host would find."""
        role = start_role("mint", bodies.mint_body(folder), debug=self._options.debug)
        self._roles[role.name] = role
        ended: list[bool] = []
        self._selector.register(role.pidfd, selectors.EVENT_READ, lambda: ended.append(True))
        while not ended:
            self._check()
            self._poll(None)
        self._selector.unregister(role.pidfd)
        for event in role.read_events() or []:
            self._take(event)
        if self._roles.pop(role.name).collect() and self._failure is None:
            self._failure = BackendError("the machine was not minted", code="boot-role-ended", role=role.name)
        self._check()

    def _start_broker(self, state: StateDirectory) -> bytes:
        self._broker_url = ""
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
        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self._broker_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._enrolment, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener, theirs:
            body = bodies.broker_body(state.folder("broker"), listener, theirs, landlock_cap=self._options.landlock_cap)
            self._start("broker", body, [listener.fileno(), theirs.fileno()])
        return bytes.fromhex(str(self._await("broker")["public_key"]))

    def _start_image(self) -> tuple[int, int]:
        """Start the worker that makes the image; gives the pipe for the broker's key, and the image's memfd."""
        key_reader, key_writer = os.pipe2(os.O_CLOEXEC)
        output = os.memfd_create("svsm-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._start("image", image_body(self._options.image, key_reader, output), [key_reader, output])
        os.close(key_reader)
        return key_writer, output

    def _image(self, started: tuple[int, int], broker_key: bytes) -> Image:
        """Tell the worker the key, import what the machine's roles need meanwhile, and have the image."""
        key_writer, output = started
        with contextlib.suppress(BrokenPipeError):  # an image from a file is made without it
            os.write(key_writer, broker_key)
        os.close(key_writer)
        bodies.preload(bodies.MACHINE_MODULES)
        image = Image.of(output, self._await("image"))
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
        with _listen(path) as listener:
            body = bodies.proxy_body(
                listener, self._options.broker or self._broker_url, landlock_cap=self._options.landlock_cap
            )
            self._start("proxy", body, [listener.fileno()])
        self._progress.fact("serial", str(path))
        return path

    def _fronts(self, state: StateDirectory) -> tuple[tuple[tuple[socket.socket, int, int], ...], str]:
        data = state.folder("run") / f"{_TPMS[0].name}.sock"
        control = data.with_name(data.name + ".ctrl")
        fronts = [(_listen(data), 0, 1), (_listen(control), 0, 0)]
        if self._options.tcp_port is not None:
            pair = _tcp_pair(self._options.tcp_port)
            fronts += [(pair[0], 0, 1), (pair[1], 0, 0)]
            self._facts["tcp"] = {"port": pair[0].getsockname()[1]}
        return tuple(fronts), f"swtpm:path={data}"

    def _start_machine(
        self, state: StateDirectory, image: Image, configuration: LaunchConfiguration, devices: HostDevices
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
            kernel_console = self._pipe(mine, self._take_kernel)
            service_console = self._pipe(mine, self._take_service)
            cap = self._options.landlock_cap
            guest = self._runs_guests = _has_unicorn()
            self._start(
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
                self._start("vcpu", vcpu, [vcpu_hardware.fileno(), memory["vmpl2"], memory["shared"]])
            else:
                self._progress.note("no guest runs: the optional package unicorn is missing (pip install svsm[guest])")
            listeners = [front[0] for front in devices.fronts]
            if devices.guest_driver is not None:
                listeners.append(devices.guest_driver)
            self._start(
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
                    *(listener.fileno() for listener in listeners),
                ],
            )
            os.close(image.descriptor)
            for listener in listeners:
                listener.close()

    def _kernel_steps(self) -> None:
        progress = self._progress
        with progress.step("attestation", "Attestation"):
            self._await("confined")
            attested = self._await("attested")
            progress.fact("key", f"released for volume {attested['volume_id']} ({attested['state']})")
        with progress.step("volume", "Volume"):
            volume = self._await("volume")
            made = "formatted, because the broker says it is new" if volume["action"] == "format" else "opened"
            progress.fact("cocoonfs", f"{made}, {int(str(volume['size_bytes'])):,} bytes", label="CocoonFS")
        with progress.step("tpms", "TPMs"):
            self._await("ready")
            for tpm in self._tpms():
                front = "socket" if tpm["front"] == "socket" else "SVSM protocol, VMPL2 guest"
                progress.fact(str(tpm["name"]), f"{front}, EK name {tpm['ek_name']}")
            if "active" in self._facts:
                progress.fact("active", "the broker has acknowledged the first format", label="volume")

    def _tpms(self) -> list[dict[str, object]]:
        tpms = self._facts["ready"].get("tpms")
        return [tpm for tpm in tpms if isinstance(tpm, dict)] if isinstance(tpms, list) else []

    def _tpm_names(self) -> dict[str, object]:
        names = {str(tpm["front"]): tpm["ek_name"] for tpm in self._tpms()}
        return {"ek_name": names.get("socket"), "guest_ek_name": names.get("svsm")}

    def _demonstrate(self, state: StateDirectory) -> None:
        progress = self._progress
        with progress.step("demonstration", "One real TPM operation each"):
            random = socket_random(state.folder("run") / f"{_TPMS[0].name}.sock")
            progress.fact("socket_random", f"TPM2_GetRandom: {random.hex()}", label=_TPMS[0].name)
            if "guest" in self._facts:
                random = guest_random(state.folder("run") / "guest.sock")
                progress.fact("guest_random", f"TPM2_GetRandom, called by the guest: {random.hex()}", label="guest0")

    def _announce(self, state: StateDirectory, boot_ms: int) -> None:
        progress = self._progress
        event = {**self._ready, "boot_ms": boot_ms, "isolation": {"reduced": sorted(self._reduced)}}
        if "tcp" in self._facts:
            event["tcti_tcp"] = f"swtpm:host=127.0.0.1,port={self._facts['tcp']['port']}"
        if self._release is not None:
            remember(state.path, self._release)
        ready = state.folder("run") / f".ready.{secrets.token_hex(4)}"
        ready.write_text(json.dumps(event) + "\n", encoding="utf-8")
        ready.rename(state.folder("run") / "ready.json")
        for reduction in sorted(self._reduced):
            progress.note(f"isolation is reduced here: {reduction}")
        progress.fact("ready", f"in {boot_ms} ms; try: tpm2_getrandom -T {self._ready['tcti']} --hex 8")
        progress.fact("stop", "Ctrl-C, or svsm stop")
        progress.event("ready", **event)  # the last of the start

    # --- events ---

    def _start(self, name: str, body: object, keep: list[int]) -> None:
        role = start_role(name, body, keep=keep, debug=self._options.debug)  # type: ignore[arg-type]
        self._roles[name] = role
        self._selector.register(role.events, selectors.EVENT_READ, lambda: self._read_role(role))
        self._selector.register(role.pidfd, selectors.EVENT_READ, lambda: self._role_ended(role))

    def _await(self, event: str) -> dict[str, object]:
        """Serve events until one of this name has come."""
        deadline = time.monotonic() + _START_SECONDS
        while event not in self._facts:
            self._check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendError(f"the boot does not get on: no '{event}' so far", code="boot-timeout")
            self._poll(left)
        self._check()
        return self._facts[event]

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stop_asked:
            raise StateError("stopped while booting", code="boot-interrupted")

    def _poll(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            key.data()

    def _read_role(self, role: Role) -> None:
        events = role.read_events()
        if events is None:
            self._selector.unregister(role.events)
            return
        for event in events:
            self._take(event)

    def _pipe(self, mine: contextlib.ExitStack, take: Callable[[dict[str, object]], None]) -> int:
        """The writing end, closed here with `mine`, of a pipe whose events go to `take`."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        mine.callback(os.close, writer)
        pipe = EventPipe(reader)
        self._consoles.append((pipe, take))
        self._selector.register(pipe, selectors.EVENT_READ, lambda: self._read_console(pipe, take))
        return writer

    def _read_console(self, pipe: EventPipe, take: Callable[[dict[str, object]], None]) -> None:
        events = pipe.read() if (pipe, take) in self._consoles else []
        if events is None:
            self._consoles.remove((pipe, take))
            self._selector.unregister(pipe)
            pipe.close()
        for event in events or []:
            take(event)

    def _take_kernel(self, event: dict[str, object]) -> None:
        self._take({**event, "role": "kernel"})

    def _take_service(self, event: dict[str, object]) -> None:
        """A service's loader says how it is confined, or why it does not start. Once clients can reach a service it
        may be hijacked, and nothing that it says ends the VM: that it died is the kernel's business."""
        if event["event"] == "confined":
            self._take_isolation(event)
        elif event["event"] in ("failed", "refused"):
            if "ready" not in self._facts:
                self._fail({**event, "role": "service"})
            else:
                self._progress.note(f"a service says that it failed: {str(event.get('code'))[:64]}")

    def _take(self, event: dict[str, object]) -> None:
        name = str(event["event"])
        self._take_isolation(event)
        if name in ("failed", "refused"):
            self._fail(event)
        elif name in ("log", "proxy-log", "client-refused", "storage-failed", "no-guest", "guest-stopped"):
            self._progress.event(name, **{key: value for key, value in event.items() if key != "event"})
            if name == "log":
                self._progress.note(f"{event.get('tpm')}: {event.get('text')}")
            elif name == "proxy-log":
                self._progress.note(f"proxy: {event.get('text')}")
            elif name in ("no-guest", "guest-stopped", "storage-failed"):
                self._progress.note(f"{name}: {event.get('message') or event.get('reason')}")
        if name != "guest" or self._runs_guests:  # the kernel says that it asks for it, not that it got it
            self._facts.setdefault(name, event)

    def _take_isolation(self, event: dict[str, object]) -> None:
        isolation = event.get("isolation")
        if isinstance(isolation, dict) and isinstance(isolation.get("reduced"), list):
            self._reduced |= {printable(str(entry))[:64] for entry in isolation["reduced"][:8]}

    def _fail(self, event: dict[str, object]) -> None:
        if self._failure is not None:
            return
        texts = {key: printable(value) for key, value in event.items() if isinstance(value, str)}
        code, message, hint = (texts.get(key) for key in ("code", "message", "hint"))
        if hint is not None and self._broker_url:
            # The kernel knows the volume and its digest, but not where this broker keeps its state.
            hint = hint.replace(_ALLOW, f"{_ALLOW} --state {self._options.state}")
        details: dict[str, str] = {key: texts[key] for key in ("role", "reason") if key in texts}
        if isinstance(event.get("places"), list) and self._options.debug:
            details["places"] = json.dumps(event["places"])
        refused = event.get("exit_code") == PolicyError.exit_code or event.get("event") == "refused"
        kind = PolicyError if refused else BackendError
        self._failure = kind(message or "no message", code=code or "role-fault", hint=hint, **details)

    def _role_ended(self, role: Role) -> None:
        self._selector.unregister(role.pidfd)
        while (events := role.read_events()) is not None:
            for event in events:
                self._take(event)
            if not events:
                break
        if role.name == "image" and "image" in self._facts:
            return  # the only one that has an end; `_dismiss` takes it away
        if not self._stop_asked and self._failure is None:
            for pipe, take in list(self._consoles):
                self._read_console(pipe, take)
        if not self._stop_asked and self._failure is None and "host-ended" in self._facts:
            self._failure = self._vm_ended()
        if not self._stop_asked and self._failure is None:
            self._failure = BackendError(
                f"the {role.name} role ended {_how(role)}",
                code="boot-role-ended",
                hint="run again with --debug: the role then keeps its stderr",
                role=role.name,
            )

    def _dismiss(self, name: str) -> None:
        """Take away a role that has done its work."""
        role = self._roles.pop(name)
        for descriptor in (role.events, role.pidfd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        role.collect()

    def _vm_ended(self) -> SvsmError:
        end = self._facts["host-ended"]
        return BackendError(
            "the virtual machine ended",
            code="boot-vm-ended",
            hint="the kernel's last events say more: run again with --json",
            reason=printable(str(end.get("reason"))),
            kernel_status=printable(str(end.get("kernel_status"))),
        )

    # --- the end ---

    def _catch_signals(self) -> None:
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._signals = (reader, writer)

        def asked() -> None:
            with contextlib.suppress(BlockingIOError):
                reader.recv(64)
            self._stop_asked = True

        self._selector.register(reader, selectors.EVENT_READ, asked)

    def _serve(self) -> None:
        self._is_ready = True
        while not self._stop_asked and self._failure is None:
            self._poll(None)
        if self._failure is None:
            self._progress.event("stopping")

    def _tear_down(self) -> None:
        """End every role: the VM in order if it still runs, the others after it."""
        # Before it was ready nothing was acknowledged to anybody, and the kernel may be waiting for a silent host.
        in_order = self._stop_asked and self._failure is None and self._is_ready
        self._stop_asked = True
        if self._power is not None:
            self._power.close()
        deadline = time.monotonic() + (_STOP_SECONDS if in_order else 1.0)
        machine = [self._roles[name] for name in ("host", "hardware", "vcpu") if name in self._roles]
        while any(_runs(role) for role in machine) and time.monotonic() < deadline:
            self._poll(0.05)
        for role in self._roles.values():
            role.kill()
        for role in self._roles.values():
            role.collect()
        self._roles.clear()
        with contextlib.suppress(FileNotFoundError):
            (self._options.state / "run" / "ready.json").unlink()


def _how(role: Role) -> str:
    ended = os.waitid(os.P_PIDFD, role.pidfd, os.WEXITED | os.WNOWAIT)
    if ended is None or ended.si_code == os.CLD_EXITED:
        return f"with status {ended.si_status if ended is not None else 'unknown'}"
    return f"by {signal.Signals(ended.si_status).name}"


def _runs(role: Role) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(role.pidfd, selectors.EVENT_READ)
        return not selector.select(0)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as failed:
        listener.close()
        raise StateError(
            f"cannot listen on {path}: {failed}",
            code="boot-socket",
            hint="a Unix socket's path has at most 107 bytes: choose a shorter --state",
        ) from failed
    finally:
        os.umask(previous)
    return listener


def _tcp_pair(port: int) -> tuple[socket.socket, socket.socket]:
    """Two listening sockets on neighbouring loopback ports, data and control; port 0 picks a free pair."""
    for _ in range(64 if port == 0 else 1):
        data = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
        try:
            return data, socket.create_server(("127.0.0.1", data.getsockname()[1] + 1), backlog=_BACKLOG)
        except (OSError, OverflowError):
            data.close()
    raise StateError("no two neighbouring ports are free", code="boot-socket", hint="name another port", port=port)


def _has_unicorn() -> bool:
    from importlib.util import find_spec

    return find_spec("unicorn") is not None
