# SPDX-License-Identifier: MIT OR Apache-2.0
"""The main job on disks of other people's making: QEMU's virtio and NVMe, and a vhost-user daemon.

With the two kinds of QEMU the key comes over its COM3. What is written through one kind is there through every other,
for `svsm volume ls`, and for the reference program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.broker.service import VAULT_KEY_NAME, Broker
from svsm.broker.vault import Vault
from svsm.confine import Role
from svsm.confine.identity import role_uid
from svsm.testing.storage_daemon import StorageDaemon
from tests.e2e.boot_support import (
    Estate,
    Instance,
    Script,
    Vm,
    descendants,
    gone_within_a_second,
    process_of,
    random_bytes,
    sha256_of,
    short_folder,
    svsm,
)
from tests.e2e.test_boot_refusals import foreign_token, huge_frame, swapped_jwe
from tests.e2e.test_tpm_durability import INDICES, Ledger, write_until_killed
from tests.e2e.tpm_support import TpmClient, nv_define, nv_write
from tests.support import peer

pytestmark = [pytest.mark.e2e, pytest.mark.interop]

KINDS = ("qemu-virtio", "qemu-nvme", "vhost-user")
QEMU_KINDS = KINDS[:2]
DISK_BYTES = 8 << 20


def qemu_of(instance: Instance) -> int:
    """The process that has become QEMU."""
    for pid in descendants(instance.process.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                return pid
    raise AssertionError("there is no QEMU")


@dataclasses.dataclass
class Served:
    """A VM's own disk file, reached in one of the ways."""

    kind: str
    vm: Vm
    folder: Path
    daemon: StorageDaemon | None = None

    def boot(self, *options: str, serial: Path | None = None) -> Instance:
        """Boot on it; the daemon is started when there is none."""
        if self.kind != "vhost-user":
            peer("qemu-system-x86_64")
            return self.vm.boot("--disk", self.kind, *options, serial=serial)
        if self.daemon is None:
            self.make()
            self.daemon = StorageDaemon(peer("qemu-storage-daemon"), self.vm.disk, self.folder)
        elif not self.daemon.pid:
            self.daemon.start()
        return self.vm.boot("--disk", f"vhost-user:{self.daemon.socket}", *options, serial=serial)

    def make(self) -> None:
        """An empty file where there is none: a daemon wants one."""
        if not self.vm.disk.exists():
            self.vm.disk.parent.mkdir(mode=0o700, exist_ok=True)
            with self.vm.disk.open("wb") as file:
                file.truncate(DISK_BYTES)

    def release(self) -> None:
        """Nobody has the file open any more."""
        if self.daemon is not None:
            self.daemon.stop()

    def kill(self, instance: Instance) -> None:
        """SIGKILL to whoever serves the disk."""
        if self.daemon is not None:
            self.daemon.kill()
        else:
            os.kill(qemu_of(instance), signal.SIGKILL)


@contextlib.contextmanager
def served(kind: str, vm: Vm) -> Iterator[Served]:
    folder = short_folder()
    made = Served(kind, vm, folder)
    try:
        yield made
    finally:
        made.release()
        shutil.rmtree(folder)


def where(vm: Vm) -> Path:
    """vtpm0's data socket."""
    return vm.state / "run" / "vtpm0.sock"


def names(instance: Instance) -> tuple[object, object]:
    """Of the endorsement keys of both TPMs."""
    ready = instance.ready()
    return ready["ek_name"], ready["guest_ek_name"]


def volume_key(owner: Estate, vm: Vm) -> bytes:
    """From its owner's vault."""
    broker = Broker.open(owner.folder / "broker")
    try:
        row = broker.volume(vm.volume_id)
    finally:
        broker.close()
    vault = Vault((owner.folder / "broker" / VAULT_KEY_NAME).read_bytes())
    return vault.unwrap(row.wrapped_key, volume_id=row.volume_id)


# --- the main job ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_that_another_kind_made_opens(used: Vm, kind: str) -> None:
    with served(kind, used.twin()) as disk, disk.boot() as instance:
        instance.ready()
        assert "opened" in instance.facts()["cocoonfs"]
        assert random_bytes(where(disk.vm)) is not None
        # As Ctrl-C at a terminal does: everybody in the group gets it, and only the supervisor may act on it.
        os.killpg(instance.process.pid, signal.SIGINT)
        assert instance.ended(seconds=20).exit_code == 0
        assert "storage-failed" not in str(instance.events)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_main_job(owner: Estate, kind: str, tmp_path: Path) -> None:
    """First boot, second boot, the default's disk, and back; then the file under two other programs."""
    vm = owner.vm()
    index, contents = 0x150_0010, b"kept on somebody else's disk"
    with served(kind, vm) as disk:
        with disk.boot() as first:
            before = names(first)
            assert "formatted" in first.facts()["cocoonfs"]
            assert vm.row()["state"] == "active"
            with TpmClient(where(vm)) as client:
                client.run(nv_define(index, len(contents)))
                client.run(nv_write(index, contents))
            assert first.stop() == 0
        for again in (disk.boot, vm.boot, disk.boot):
            if again == vm.boot:
                disk.release()
            with again() as instance:
                assert names(instance) == before
                assert "opened" in instance.facts()["cocoonfs"]
                with TpmClient(where(vm)) as client:
                    assert client.read_index(index, len(contents)) == contents
                assert instance.stop() == 0
        disk.release()
        shown_by_both(owner, vm, tmp_path)


def shown_by_both(owner: Estate, vm: Vm, folder: Path) -> None:
    """`svsm volume ls` and the reference program list the same files."""
    key = folder / "key"
    key.write_text(volume_key(owner, vm).hex())
    listed = json.loads(svsm("volume", "ls", str(vm.disk), "--key-file", str(key), "--json").stdout)
    ours = {int(file["inode"]) for file in listed["files"]}
    image = folder / "image"
    shutil.copyfile(vm.disk, image)
    command = [str(peer("cocoonfs")), "-i", str(image), "-f", "list-files", "-K", key.read_text()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    theirs = {int(line.split()[0]) for line in done.stdout.splitlines()}
    assert len(ours) >= 2
    assert ours <= theirs


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_disk_is_no_reason_to_start_afresh(used: Vm, kind: str) -> None:
    with served(kind, used.twin()) as disk:
        disk.vm.disk.write_bytes(bytes(DISK_BYTES))
        with disk.boot() as instance:
            ended = instance.ended()
        assert (ended.exit_code, ended.code) == (3, "birth-no-volume")
        disk.release()
        assert disk.vm.disk.read_bytes() == bytes(DISK_BYTES)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "script", "exit_code", "code"),
    [
        ("qemu-virtio", foreign_token, 3, "token-signature"),
        ("qemu-nvme", swapped_jwe, 3, "attestation-confirmation"),
        ("qemu-virtio", huge_frame, 1, "frame-too-long"),
    ],
)
def test_a_dishonest_proxy_gets_nowhere_over_com3_either(
    used: Vm, kind: str, script: Script, exit_code: int, code: str
) -> None:
    """The bytes come through a serial port; what is believed of them is the same."""
    with served(kind, used.twin()) as disk:
        before = sha256_of(disk.vm.disk)
        with disk.vm.middleman(script) as middle, disk.boot(serial=middle.path) as instance:
            ended = instance.ended(seconds=90)
        assert middle.seen
        assert instance.find("ready") is None
        assert (ended.exit_code, ended.code) == (exit_code, code)
        assert sha256_of(disk.vm.disk) == before


@pytest.mark.long
@pytest.mark.parametrize("kind", QEMU_KINDS)
def test_one_file_serves_one_machine(used: Vm, kind: str) -> None:
    vm, other = used.twin(), used.twin()
    peer("qemu-system-x86_64")
    for first, second in ((kind, "file"), ("file", kind)):
        with vm.boot("--disk", f"{first}:{vm.disk}") as instance:
            instance.ready()
            with other.boot("--disk", f"{second}:{vm.disk}") as late:
                ended = late.ended()
            assert (ended.exit_code, ended.code) == (1, "block-in-use")
            assert random_bytes(where(vm)) is not None


@pytest.mark.long
def test_what_qemu_says_before_it_ends_is_the_hint(used: Vm) -> None:
    """Somebody else has a lock of QEMU's kind on the image."""
    peer("qemu-system-x86_64")
    vm = used.twin()
    with vm.disk.open("r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 104, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        with vm.boot("--disk", "qemu-virtio") as instance:
            ended = instance.ended()
    assert (ended.exit_code, ended.code, ended.details["role"]) == (1, "boot-role-ended", "device")
    assert "lock" in ended.hint


def test_without_qemu_its_package_is_named(used: Vm, tmp_path: Path) -> None:
    vm = used.twin()
    done = svsm(
        "boot", "--state", str(tmp_path / "s"), "--image", str(vm.estate.image), "--disk", "qemu-nvme",
        check=False, env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "[qemu-missing]" in done.stderr
    assert "apt-get install qemu-system-x86" in done.stderr
    assert not (tmp_path / "s").exists()


@contextlib.contextmanager
def closing_listener(path: Path) -> Iterator[None]:
    """Whoever connects is answered with something else."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"220 mail.example ESMTP\r\n" * 4)
                    connection.recv(64)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield
        server.join(10)


@pytest.mark.long
@pytest.mark.parametrize("listens", [False, True])
def test_a_socket_without_a_daemon_is_refused(used: Vm, place: Path, listens: bool) -> None:
    """Nobody there, or a program that speaks something else."""
    vm = used.twin()
    path = place / "vu.sock"
    with contextlib.ExitStack() as stack:
        if listens:
            stack.enter_context(closing_listener(path))
        instance = stack.enter_context(vm.boot("--disk", f"vhost-user:{path}"))
        ended = instance.ended()
    assert ended.exit_code == 1
    assert ended.code in (("vhost-user-gone", "vhost-user-reply") if listens else ("disk-open",))


# --- death -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_serves_the_disk_dies_while_commands_flow(owner: Estate, kind: str) -> None:
    """The boot ends and says why; the next one has everything that was acknowledged."""
    rng = random.Random(f"boot disks {kind}")
    ledger = Ledger()
    with served(kind, owner.vm()) as disk:
        for turn in range(4):
            with disk.boot() as instance:
                instance.ready()
                with TpmClient(where(disk.vm)) as client:
                    if not turn:
                        for index, size in INDICES.items():
                            client.run(nv_define(index, size))
                            client.run(nv_write(index, bytes(size)))
                    ledger.settle(client)
                if turn == 3:
                    assert instance.stop() == 0
                    break
                writer = threading.Thread(target=write_until_killed, args=(where(disk.vm), rng, ledger))
                writer.start()
                time.sleep(rng.uniform(0.2, 0.6))
                below = descendants(instance.process.pid)
                disk.kill(instance)
                ended = instance.ended(seconds=30)
                writer.join(30)
                assert not writer.is_alive()
                assert ended.exit_code == 1
                # Which of the two is gone first is up to the scheduler: a kernel whose disk fails ends as well.
                if ended.details["role"] != "kernel":
                    assert ended.details["role"] == "device"
                    assert ended.code == ("vhost-user-gone" if kind == "vhost-user" else "boot-role-ended")
                gone_within_a_second(below)
            ledger.unexpected = None  # the last answer may be TPM_RC_FAILURE
    assert ledger.acknowledged > 6


@pytest.mark.long
@pytest.mark.parametrize("kind", QEMU_KINDS)
def test_qemu_ends_with_the_supervisor(used: Vm, kind: str) -> None:
    with served(kind, used.twin()) as disk:
        with disk.boot() as instance:
            instance.ready()
            assert qemu_of(instance)
            instance.kill()  # asserts that nothing outlives it by a second
        with disk.boot() as instance:
            instance.ready()
            pid = qemu_of(instance)
            assert instance.stop() == 0
            gone_within_a_second([pid])


# --- isolation ---------------------------------------------------------------------------------------------------


def held(pid: int) -> list[str]:
    """What a process's descriptors reach."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


@pytest.mark.long
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("kind", QEMU_KINDS)
@pytest.mark.parametrize("cap", ["7", "2"])
def test_qemu_is_confined_and_has_the_shared_memory_and_no_other(used: Vm, kind: str, cap: str) -> None:
    with served(kind, used.twin()) as disk, disk.boot("--landlock-abi", cap) as instance:
        assert instance.ready()["isolation"] == {"reduced": []}
        pid = process_of(instance.process.pid, Role.QEMU)
        assert pid == qemu_of(instance)
        status = Path(f"/proc/{pid}/status").read_text()
        uid = role_uid(Role.QEMU)
        for line in (f"Uid:\t{uid}\t{uid}\t{uid}", "Seccomp:\t2", "NoNewPrivs:\t1", "CapPrm:\t0000000000000000"):
            assert line in status
        files = {name for name in held(pid) if not name.startswith(("socket:", "anon_inode:", "/dev/null"))}
        memories = {name.partition(":")[2].split()[0] for name in files if name.startswith("/memfd:")}
        assert memories == {"svsm-shared", "svsm-firmware", "svsm-qemu-messages"}
        assert {name for name in files if not name.startswith("/memfd:")} == {str(disk.vm.disk)}
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "svsm-shared" in maps
        assert "svsm-private" not in maps
        assert "svsm-vmpl2" not in maps
        for role in (Role.KERNEL, Role.HOST):
            other = process_of(instance.process.pid, role)
            assert other is not None
            assert str(disk.vm.disk) not in held(other)
