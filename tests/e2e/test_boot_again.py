# SPDX-License-Identifier: MIT OR Apache-2.0
"""One machine over several boots: the same TPM, one instance at a time, nothing left behind, nothing needed around."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from svsm.cli.supervisor.state import StateDirectory
from svsm.confine import Role
from tests.e2e.boot_support import (
    SILENT,
    Estate,
    Instance,
    Script,
    Vm,
    descendants,
    gone_within_a_second,
    honest,
    process_of,
    random_bytes,
    svsm,
)
from tests.support import peer

pytestmark = pytest.mark.e2e

CONTENTS = b"what the owner wrote before the lights went out"
INDEX = "0x1500001"


def tpm2(tool: str, tcti: str, *words: str, data: bytes = b"") -> bytes:
    done = subprocess.run(
        [str(peer(tool)), *words, "-T", tcti], input=data, capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


@pytest.mark.interop
def test_the_second_boot_finds_the_same_tpm(owner: Estate) -> None:
    state = owner.embedded()
    with Instance(state, "--image", str(owner.image)) as first:
        ready = first.ready()
        size = str(len(CONTENTS))
        tpm2("tpm2_nvdefine", ready["tcti"], INDEX, "-C", "o", "-s", size, "-a", "ownerread|ownerwrite")
        tpm2("tpm2_nvwrite", ready["tcti"], INDEX, "-C", "o", "-i", "-", data=CONTENTS)
        assert first.stop() == 0
        assert first.events[-1]["event"] == "stopped"
    with Instance(state, "--image", str(owner.image)) as second:
        again = second.ready()
        same = ("launch_digest", "payload_digest", "ek_name", "guest_ek_name", "volume_id")
        assert [again[key] for key in same] == [ready[key] for key in same]
        assert "known, active" in second.facts()["volume"]
        assert tpm2("tpm2_nvread", again["tcti"], INDEX, "-C", "o", "-s", size) == CONTENTS


@pytest.mark.long
def test_two_machines_at_a_broker_elsewhere_have_two_tpms(owner: Estate, used: Vm) -> None:
    names = []
    for vm in (used.twin(), owner.vm()):
        with Instance(vm.state, "--broker", owner.url, "--image", str(owner.image)) as instance:
            ready = instance.ready()
            names += [ready["ek_name"], ready["guest_ek_name"]]
    assert len({*names, None}) == 5


def test_one_instance_per_state_and_status_and_stop(used: Vm) -> None:
    vm = used.twin()
    here = ("--state", str(vm.state))

    def status() -> Mapping[str, object]:
        found: Mapping[str, object] = json.loads(svsm("status", *here, "--json").stdout)
        return found

    assert status()["status"] == "stopped"
    assert svsm("stop", *here).stdout == "nothing was running\n"
    with vm.boot() as instance:
        ready = instance.ready()
        with vm.boot() as second:
            refused = second.ended(seconds=10)
        assert (refused.exit_code, refused.code) == (1, "state-busy")
        assert refused.details == {"process_id": instance.process.pid}
        assert str(vm.state) in refused.hint
        shown = status()
        assert (shown["status"], shown["process_id"]) == ("ready", instance.process.pid)
        assert [shown[key] for key in ("tcti", "ek_name")] == [ready[key] for key in ("tcti", "ek_name")]
        assert random_bytes(vm.state / "run" / "vtpm0.sock") is not None  # the refused one took nothing away
        assert svsm("stop", *here).stdout == "stopped\n"
        assert instance.ended(seconds=10).exit_code == 0
    assert status()["status"] == "stopped"
    assert not (vm.state / "run" / "ready.json").exists()


def test_killing_the_supervisor_ends_every_role_within_a_second_and_the_next_boot_works(used: Vm) -> None:
    vm = used.twin()
    with vm.boot() as instance:
        ready = instance.ready()
        assert len(descendants(instance.process.pid)) >= 6
        instance.kill()  # asserts that nothing outlives it by a second
    assert json.loads(svsm("status", "--state", str(vm.state), "--json").stdout)["status"] == "stopped"
    with vm.boot() as instance:
        assert instance.ready()["ek_name"] == ready["ek_name"]


@pytest.mark.long
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("role", "code"),
    [
        ("hardware", "boot-role-ended|boot-vm-ended|platform-hardware"),  # the kernel may be heard first
        ("host", "boot-role-ended"),
        ("proxy", "boot-role-ended"),
        ("broker", "boot-role-ended"),
        ("kernel", "boot-vm-ended"),
        ("spawner", "spawn-failed"),
    ],
)
def test_without_one_of_its_roles_the_whole_instance_ends(owner: Estate, role: str, code: str) -> None:
    """A role that dies takes the instance with it: exit 1, a stable code, no process left, and the next boot works."""
    state = owner.embedded()
    with Instance(state, "--image", str(owner.image)) as instance:
        ready = instance.ready()
        below = descendants(instance.process.pid)
        victim = process_of(instance.process.pid, Role[role.upper()])
        if role == "spawner":
            hardware = process_of(instance.process.pid, Role.HARDWARE)
            assert hardware is not None
            victim = int(Path(f"/proc/{hardware}/task/{hardware}/children").read_text().split()[0])
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        ended = instance.ended(seconds=20)
        assert ended.exit_code == 1
        assert ended.code in code.split("|")
        gone_within_a_second(below)
    with Instance(state, "--image", str(owner.image)) as instance:
        assert instance.ready()["ek_name"] == ready["ek_name"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["state.json", "another version", "a stranger's folder"])
def test_a_state_that_is_not_ours_is_left_alone(owner: Estate, place: Path, name: str) -> None:
    state = owner.embedded()
    identity = state / "state.json"
    if name == "state.json":
        identity.write_text("{")
        expected = "state-foreign"
    elif name == "another version":
        identity.write_text(json.dumps({**json.loads(identity.read_text()), "version": 99}))
        expected = "state-version"
    else:
        state = place
        (place / "letters").write_text("not ours")
        expected = "state-foreign"
    before = sorted(path.name for path in state.iterdir())
    with Instance(state, "--image", str(owner.image)) as instance:
        ended = instance.ended(seconds=10)
    assert (ended.exit_code, ended.code) == (1, expected)
    assert sorted({path.name for path in state.iterdir()} - {"lock"}) == [name for name in before if name != "lock"]


def test_a_boot_needs_no_network_and_no_other_program(owner: Estate) -> None:
    """Loopback alone, where the kernel grants a network namespace, and a PATH with nothing in it."""
    wrap: tuple[str, ...] = ()
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    if unshare and ip and subprocess.run([unshare, "-n", "true"], check=False, capture_output=True).returncode == 0:
        wrap = (unshare, "-n", "/bin/sh", "-c", f'{ip} link set lo up && exec "$@"', "sh")
    environment = {"PATH": "/nonexistent", "HOME": str(owner.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    state = owner.embedded()
    with Instance(state, env=environment, wrap=wrap) as instance:  # it builds its image too
        instance.ready()
        assert random_bytes(state / "run" / "vtpm0.sock") is not None
        routes = Path(f"/proc/{instance.process.pid}/net/route").read_text().splitlines()[1:]
        assert routes == [] or not wrap
        assert instance.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("script", [honest, lambda _number, _body, _ask: SILENT], ids=["honest", "silent"])
def test_stop_while_booting_ends_it_soon(used: Vm, script: Script) -> None:
    """Also while the kernel waits for a host that says nothing."""
    vm = used.twin()
    with vm.middleman(script) as middle, vm.boot(serial=middle.path) as instance:
        instance.wait_for("step", step="attestation", state="started")
        assert StateDirectory.existing(vm.state).stop(timeout_s=8)
        ended = instance.ended(seconds=5)
    assert (ended.exit_code, ended.code) == (1, "boot-interrupted")
    with vm.boot() as instance:
        instance.ready()


@pytest.mark.long
def test_of_several_first_boots_at_once_one_wins(owner: Estate) -> None:
    state = owner.embedded()
    with contextlib.ExitStack() as stack:
        instances = [stack.enter_context(Instance(state, "--image", str(owner.image))) for _ in range(4)]
        deadline = time.monotonic() + 60
        while (running := [one for one in instances if one.process.poll() is None]) != [] and len(running) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (winner,) = running
        winner.ready()
        losers = [instance.ended() for instance in instances if instance is not winner]
    assert [(ended.exit_code, ended.code) for ended in losers] == [(1, "state-busy")] * 3


@pytest.mark.long
@pytest.mark.parametrize(("here", "there"), [("file", "file"), ("file", "direct"), ("direct", "file")])
def test_one_disk_serves_one_instance(used: Vm, here: str, there: str) -> None:
    """Whoever holds the file, its device process or the kernel itself, holds its lock."""
    first, second = used.twin(), used.twin()
    words = ("--disk", f"{there}:{first.disk}")
    with first.boot("--disk", f"{here}:{first.disk}") as instance:
        instance.ready()
        with second.boot(*words) as other:
            ended = other.ended()
        assert (ended.exit_code, ended.code) == (1, "block-in-use")
        assert random_bytes(first.state / "run" / "vtpm0.sock") is not None


@pytest.mark.usefixtures("as_root")
def test_a_disk_whose_device_dies_ends_the_machine_and_the_next_boot_has_everything(used: Vm) -> None:
    """The next one without the device process: what both ways of reaching the file see is the same volume."""
    vm = used.twin()
    with vm.boot() as instance:
        before = instance.ready()
        victim = process_of(instance.process.pid, Role.DEVICE)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        ended = instance.ended(seconds=20)
    assert (ended.exit_code, ended.code, ended.details["role"]) == (1, "boot-role-ended", "device")
    with vm.boot("--disk", f"direct:{vm.disk}") as instance:
        again = instance.ready()
        assert process_of(instance.process.pid, Role.DEVICE) is None
    assert again["ek_name"] == before["ek_name"]
    assert again["guest_ek_name"] == before["guest_ek_name"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(also, marks=pytest.mark.long) for also in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_to_the_whole_process_group_is_an_orderly_stop(owner: Estate, number: signal.Signals) -> None:
    """A service manager, a shell and a terminal signal everybody; only the supervisor may act on it."""
    with Instance(owner.embedded(), "--image", str(owner.image)) as instance:
        instance.ready()
        os.killpg(instance.process.pid, number)
        assert instance.ended(seconds=20).exit_code == 0
        assert instance.events[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    "words",
    [
        ("--tpm-tcp", "70000"),
        ("--tpm-tcp", "65535"),
        ("--tpm-tcp", "swtpm"),
        ("--landlock-abi", "-1"),
        ("--disk", "nvme:x"),
        ("--disk", "vhost-user"),
        ("--disk", "qemu-nvme:"),
        ("--broker", "http://x"),
        ("--broker-key", "broker.pem"),
    ],
)
def test_wrong_words_are_a_usage_error(tmp_path: Path, words: tuple[str, str]) -> None:
    done = svsm("boot", "--state", str(tmp_path / "s"), *words, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "s").exists()
