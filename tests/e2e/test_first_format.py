# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume's first format: killed at every step, watched by a hostile proxy, wanted by two instances at once.

Whatever happens, the next honest boot succeeds, and from then on the TPM stays the same. No TPM answer leaves before
the broker has acknowledged the first state.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import svsm
from svsm.cli.supervisor.state import StateDirectory
from svsm.confine import Role
from svsm.formats.negotiation import ChannelFrame
from svsm.testing.diskprocess import CachedDisk, tear
from svsm.testing.vhost_user_disk import serve_connection
from tests.e2e.boot_support import (
    SILENT,
    Ask,
    Ended,
    Estate,
    HangUp,
    Instance,
    Raw,
    Script,
    Vm,
    descendants,
    process_of,
    random_bytes,
    sha256_of,
)

pytestmark = pytest.mark.e2e

Answer = bytes | Raw | None
DISK_BYTES = 8 << 20
STEPS = [
    (step, state)
    for step in ("image", "services", "machine", "attestation", "volume", "tpms", "demonstration")
    for state in ("started", "done")
]


def boots_from_now_on(boot: Callable[[], Instance]) -> str:
    """Two boots in a row that find one TPM; how the first of them found the volume."""
    with boot() as instance:
        ready = instance.ready()
        found = instance.facts()["cocoonfs"]
        assert instance.stop() == 0
    with boot() as instance:
        again = instance.ready()
        assert [again[key] for key in ("ek_name", "guest_ek_name")] == [ready["ek_name"], ready["guest_ek_name"]]
        assert instance.facts()["cocoonfs"].startswith("opened")
    return found


def refused(vm: Vm, script: Script, *, seconds: float = 60) -> Ended:
    with vm.middleman(script) as middle, vm.boot(serial=middle.path) as instance:
        ended = instance.ended(seconds=seconds)
    assert instance.find("ready") is None
    return ended


# --- killed at every step ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("step", "state"), STEPS)
def test_a_kill_at_each_reported_step(owner: Estate, step: str, state: str) -> None:
    vm_state = owner.embedded()
    with Instance(vm_state, "--image", str(owner.image)) as instance:
        instance.wait_for("step", step=step, state=state)
        instance.kill()
    boots_from_now_on(lambda: Instance(vm_state, "--image", str(owner.image)))


def _kill_at(frame: int, *, answered: bool) -> tuple[Script, threading.Event]:
    """A script that says when it has frame `frame` in hand (or its answer), and lets nothing further through."""
    there = threading.Event()

    def script(number: int, body: bytes, ask: Ask) -> Answer:
        if number < frame:
            return ask(body)
        if answered:
            ask(body)
        there.set()
        return SILENT

    return script, there


@pytest.mark.parametrize(
    ("frame", "answered", "found", "state"),
    [
        pytest.param(0, False, "formatted", "new", marks=pytest.mark.long),
        pytest.param(0, True, "formatted", "new", marks=pytest.mark.long),
        pytest.param(1, False, "formatted", "new", marks=pytest.mark.long),
        pytest.param(1, True, "formatted", "new", marks=pytest.mark.long),
        pytest.param(2, False, "opened", "new", marks=pytest.mark.long),
        (2, True, "opened", "active"),
    ],
)
def test_a_kill_at_each_message_to_the_broker(
    owner: Estate, frame: int, answered: bool, found: str, state: str
) -> None:
    vm = owner.vm()
    script, there = _kill_at(frame, answered=answered)
    with vm.middleman(script) as middle, vm.boot(serial=middle.path) as instance:
        assert there.wait(30)
        instance.kill()
    assert vm.row()["state"] == state
    assert boots_from_now_on(vm.boot).startswith(found)
    assert vm.row()["state"] == "active"


class SteppedDisk(CachedDisk):
    """Counts what changes it, and goes at one of these: nothing after it is carried out."""

    def __init__(self, path: Path, *, end_at: int, gone: threading.Event) -> None:
        self.spill_path = path.with_suffix(".spill")
        super().__init__(path, block_size_bytes=512, spill=self.spill_path)
        self.steps = 0
        self._end_at = end_at
        self._gone = gone

    def _step(self) -> None:
        self.steps += 1
        if self.steps >= self._end_at:
            self._gone.set()
            raise EOFError("the power is cut")

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset, data)
        self._step()

    def flush(self) -> None:
        self._step()
        super().flush()


class StepServer:
    """A disk for one boot, behind the virtio driver."""

    def __init__(self, place: Path, image: Path, *, end_at: int) -> None:
        self.path = place / f"d{end_at}"
        self.gone = threading.Event()
        self._image = image
        self.disk = SteppedDisk(image, end_at=end_at, gone=self.gone)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        serve_connection(connection, self._image, self.disk)

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()
        self.path.unlink()


def cut_power(owner: Estate, place: Path, step: int, loss: str) -> bool:
    """A first boot whose disk goes at its `step`-th write or flush, with everything else; then it boots.

    Returns:
        False when that boot became ready before so many steps were made.
    """
    vm, image = owner.vm(), place / f"{step}.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    server = StepServer(place, image, end_at=step)
    with vm.boot("--disk", f"vhost-user:{server.path}") as instance:
        while not server.gone.wait(0.005):
            if instance.process.poll() is not None or _is_ready(instance):
                break
        reached = server.gone.is_set()
        instance.kill()
    server.close()
    if loss == "tear":
        tear(image, server.disk.spill_path, seed=step)
    with vm.boot("--disk", f"file:{image}") as instance:
        instance.ready()
    image.unlink()
    return reached


def _is_ready(instance: Instance) -> bool:
    return (instance.state / "run" / "ready.json").exists()


@pytest.mark.parametrize(("step", "loss"), [(4, "tear"), pytest.param(40, "drop", marks=pytest.mark.long)])
def test_a_power_cut_at_some_writes(owner: Estate, place: Path, step: int, loss: str) -> None:
    assert cut_power(owner, place, step, loss)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("share", range(6))
def test_a_power_cut_at_every_write_and_flush(owner: Estate, place: Path, share: int) -> None:
    """Until a first boot is ready before the cut comes; drop and tear take turns."""
    reached = 0
    for step in range(1 + share, 500, 6):
        if not cut_power(owner, place, step, "drop" if step // 6 % 2 else "tear"):
            break
        reached += 1
    assert reached >= 7  # a first boot makes more than forty


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("seed", range(2))
def test_a_kill_of_one_process_at_random_times(owner: Estate, seed: int) -> None:
    rng = random.Random(seed)
    for role in (Role.KERNEL, Role.HARDWARE, Role.HOST, Role.DEVICE, None):
        state = owner.embedded()
        with Instance(state, "--image", str(owner.image)) as instance:
            if role is None:
                time.sleep(rng.uniform(0.0, 1.5))
                instance.kill()
            else:
                instance.wait_for("step", step="machine", state="started")
                time.sleep(rng.uniform(0.0, 1.0))
                deadline = time.monotonic() + 20
                while (victim := process_of(instance.process.pid, role)) is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                assert victim is not None
                os.kill(victim, signal.SIGKILL)
                assert instance.ended(seconds=30).exit_code == 1
        boots_from_now_on(lambda state=state: Instance(state, "--image", str(owner.image)))  # type: ignore[misc]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_kill_at_random_times_of_the_very_first_boot(place: Path) -> None:
    """With nothing there before: the state directory, the machine's keys and the broker's are being made."""
    # A copy of the sources: each boot builds its image, and would be refused if somebody edited a file meanwhile.
    sources = place / "src"
    shutil.copytree(Path(svsm.__file__).parent, sources / "svsm", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    rng = random.Random(1)
    for number, bound in enumerate([0.15, 0.3, 0.6, 1.0, 2.0, 3.0, 4.0, 4.0]):
        state = place / str(number)
        with Instance(state, env=environment) as instance:
            time.sleep(rng.uniform(bound / 2, bound))
            instance.kill()
        boots_from_now_on(lambda state=state: Instance(state, env=environment))  # type: ignore[misc]
        shutil.rmtree(state)


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "state.json.new"]])
def test_a_state_whose_making_was_cut_short_is_made_anew(place: Path, left: list[str]) -> None:
    state = place / "s"
    state.mkdir()
    for name in left:
        (state / name).write_text("{")
    made = StateDirectory.open_for_boot(state)
    assert json.loads((state / "state.json").read_text())["volume_id"] == str(made.volume_id)
    assert not (state / "state.json.new").exists()


# --- the acknowledgement -----------------------------------------------------------------------------------------


def _from_frame_two(change: Callable[[bytes, Ask], Answer]) -> Script:
    return lambda number, body, ask: ask(body) if number < 2 else change(body, ask)


def _flipped(body: bytes, at: int) -> bytes:
    sealed = bytearray(ChannelFrame.parse(body).sealed)
    sealed[at] ^= 1
    return ChannelFrame(bytes(sealed)).pack()


def _hang_up(_body: bytes, _ask: Ask) -> Answer:
    raise HangUp


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(lambda body, ask: _flipped(ask(body), -1), "channel-forged", id="forged-tag"),
        pytest.param(
            lambda body, ask: _flipped(ask(body), 20), "channel-forged", id="forged-text", marks=pytest.mark.long
        ),
        pytest.param(lambda body, _ask: body, "channel-forged", id="reflected", marks=pytest.mark.long),
        pytest.param(
            lambda _body, _ask: b'{"channel":"' + b"A" * 64 + b'"}',
            "channel-forged",
            id="invented",
            marks=pytest.mark.long,
        ),
        pytest.param(_hang_up, "channel-closed", id="withheld-by-hanging-up", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(150)
def test_an_acknowledgement_that_is_not_the_brokers(
    owner: Estate, change: Callable[[bytes, Ask], Answer], code: str
) -> None:
    vm = owner.vm()
    ended = refused(vm, _from_frame_two(change), seconds=90)
    assert ended.code == code
    assert ended.exit_code == (3 if code == "channel-forged" else 1)
    assert boots_from_now_on(vm.boot).startswith("opened")
    assert vm.row()["state"] == "active"


@pytest.mark.long
def test_an_acknowledgement_of_another_session_is_refused(owner: Estate) -> None:
    """The broker's genuine yes to one attempt, kept by the host, does not serve the next one."""
    vm = owner.vm()
    kept: list[bytes] = []

    def keep(body: bytes, ask: Ask) -> Answer:
        kept.append(ask(body))
        raise HangUp

    other = owner.vm()
    assert refused(other, _from_frame_two(keep)).code == "channel-closed"
    ended = refused(vm, _from_frame_two(lambda _body, _ask: kept[0]))
    assert (ended.exit_code, ended.code) == (3, "channel-forged")
    assert vm.row()["state"] == "new"
    assert other.row()["state"] == "active"  # the broker heard it, the kernel never knew
    for machine in (vm, other):
        assert boots_from_now_on(machine.boot).startswith("opened")


@pytest.mark.timeout(150)
def test_no_answer_leaves_before_the_acknowledgement(owner: Estate) -> None:
    """While it is withheld the TPM's socket connects and says nothing; once it comes, the answer does too."""
    vm = owner.vm()
    asked, let_go = threading.Event(), threading.Event()

    def hold(body: bytes, ask: Ask) -> Answer:
        answer = ask(body)
        asked.set()
        assert let_go.wait(60)
        return answer

    with vm.middleman(_from_frame_two(hold)) as middle, vm.boot(serial=middle.path) as instance:
        assert asked.wait(30)
        front = vm.state / "run" / "vtpm0.sock"
        assert random_bytes(front, seconds=1.0) is None
        assert instance.find("ready") is None
        assert vm.row()["state"] == "active"
        let_go.set()
        instance.ready()
        assert random_bytes(front) is not None


# --- two instances with "new" ------------------------------------------------------------------------------------


@pytest.mark.timeout(150)
@pytest.mark.parametrize("first_reports_first", [True, pytest.param(False, marks=pytest.mark.long)])
def test_of_two_instances_with_new_tokens_one_lives(owner: Estate, first_reports_first: bool) -> None:
    """Both hold the key and a "new" token and have formatted; only the one that attested last may report."""
    first = owner.vm()
    second = first.twin()
    first_asks, first_may, second_asks, second_may = (threading.Event() for _ in range(4))

    def held(asks: threading.Event, may: threading.Event) -> Script:
        def hold(body: bytes, ask: Ask) -> Answer:
            asks.set()
            assert may.wait(60)
            return ask(body)

        return _from_frame_two(hold)

    with (
        first.middleman(held(first_asks, first_may)) as to_first,
        first.boot(serial=to_first.path) as loser,
    ):
        assert first_asks.wait(30)
        with (
            second.middleman(held(second_asks, second_may)) as to_second,
            second.boot(serial=to_second.path) as winner,
        ):
            assert second_asks.wait(30)
            order = [first_may, second_may] if first_reports_first else [second_may, first_may]
            order[0].set()
            if first_reports_first:
                ended = loser.ended(seconds=30)
                order[1].set()
                winner.ready()
            else:
                winner.ready()
                order[1].set()
                ended = loser.ended(seconds=30)
            assert (ended.exit_code, ended.code) == (3, "birth-refused")
            reason = "broker-not-last-attested" if first_reports_first else "broker-already-active"
            assert ended.details["reason"] == reason
            assert loser.find("ready") is None
            assert random_bytes(second.state / "run" / "vtpm0.sock") is not None
            winner.stop()
    assert first.row()["state"] == "active"
    boots_from_now_on(second.boot)


# --- a foreign proxy ---------------------------------------------------------------------------------------------


def foreign(number: int, body: bytes, ask: Ask) -> Answer:
    """A proxy that never heard of the extension: the kernel's offer is dropped, as COCONUT's drops unknown members."""
    if number == 0:
        message = json.loads(body)
        assert message.pop("extensions") == ["channel"]
        answer = ask(json.dumps(message).encode())
        assert "extensions" not in json.loads(answer)
        return answer
    assert number == 1, "the kernel speaks of a channel that was not agreed"
    return ask(body)


def test_a_foreign_proxy_serves_every_boot_but_the_first(owner: Estate) -> None:
    vm = owner.vm()
    ended = refused(vm, foreign)
    assert (ended.exit_code, ended.code) == (3, "birth-foreign-proxy")
    assert "svsm proxy" in ended.hint
    assert vm.disk.read_bytes() == bytes(DISK_BYTES)
    assert vm.row()["state"] == "new"
    with vm.boot() as instance:
        ready = instance.ready()
        assert instance.stop() == 0
    before = sha256_of(vm.disk)
    with vm.middleman(foreign) as middle, vm.boot(serial=middle.path) as instance:
        assert instance.ready()["ek_name"] == ready["ek_name"]
        assert random_bytes(vm.state / "run" / "vtpm0.sock") is not None
        assert instance.stop() == 0
    assert sha256_of(vm.disk) != before  # it lived, and its shutdown was stored


@pytest.mark.long
def test_a_foreign_proxy_and_a_disk_from_an_earlier_attempt(owner: Estate) -> None:
    """Formatted by an honest first boot that never reported: still new, so still refused, and still untouched."""
    vm = owner.vm()
    script, there = _kill_at(2, answered=False)
    with vm.middleman(script) as middle, vm.boot(serial=middle.path) as instance:
        assert there.wait(30)
        assert len(descendants(instance.process.pid)) >= 5
        instance.kill()
    before = sha256_of(vm.disk)
    assert refused(vm, foreign).code == "birth-foreign-proxy"
    assert sha256_of(vm.disk) == before
    assert boots_from_now_on(vm.boot).startswith("opened")
