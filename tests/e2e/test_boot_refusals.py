# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a hostile host can put in place of disk, serial line and launch: each is refused, and the disk stays as it was.

Every case is a whole boot. The disk's SHA-256 is compared before and after; what follows an attack on a twin is an
honest boot of the same state, which finds the same TPM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from svsm.crypto import jwe
from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.token import SigningKey
from svsm.formats.negotiation import AttestationAnswer, AttestationRequest, NegotiationAnswer
from svsm.formats.strict_json import base64_std, base64_url, from_base64_url
from svsm.hardware.machine_store import mint
from tests.e2e.boot_support import SILENT, Ask, Ended, Estate, HangUp, Instance, Raw, Script, Vm, sha256_of
from tests.simulated import authority_keys

pytestmark = pytest.mark.e2e

Answer = bytes | Raw | None


def refused(vm: Vm, *, disk: Path | None = None, script: Script | None = None, options: tuple[str, ...] = ()) -> Ended:
    """Boot a VM that must not come up, and whose disk must stay as it is."""
    path = disk or vm.disk
    before = sha256_of(path) if path.exists() else None
    if script is None:
        with vm.boot(*options) as instance:
            ended = instance.ended()
    else:
        with vm.middleman(script) as middle, vm.boot(*options, serial=middle.path) as instance:
            ended = instance.ended(seconds=90)
    assert instance.find("ready") is None
    if before is not None:
        assert sha256_of(path) == before
    return ended


# --- the disk ----------------------------------------------------------------------------------------------------


def blank(vm: Vm, _owner: Estate) -> None:
    size = vm.disk.stat().st_size
    vm.disk.write_bytes(bytes(size))


def missing(vm: Vm, _owner: Estate) -> None:
    vm.disk.unlink()


def noise(vm: Vm, _owner: Estate) -> None:
    vm.disk.write_bytes(os.urandom(vm.disk.stat().st_size))


def half(vm: Vm, _owner: Estate) -> None:
    os.truncate(vm.disk, vm.disk.stat().st_size // 2)


def one_sector_less(vm: Vm, _owner: Estate) -> None:
    os.truncate(vm.disk, vm.disk.stat().st_size - 512)


def first_block(vm: Vm, _owner: Estate) -> None:
    os.truncate(vm.disk, 4096)


def other_volume(vm: Vm, owner: Estate) -> None:
    other = owner.vm()
    with other.boot() as instance:
        instance.ready()
        instance.stop()
    shutil.copyfile(other.disk, vm.disk)


def wrong_magic(vm: Vm, _owner: Estate) -> None:
    flip(vm.disk, 0)


def damaged(vm: Vm, _owner: Estate) -> None:
    data = bytearray(vm.disk.read_bytes())
    for offset in range(4096, len(data)):
        data[offset] ^= 0xFF
    vm.disk.write_bytes(data)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (blank, "birth-no-volume"),
        pytest.param(half, "birth-other-volume", marks=pytest.mark.long),
        pytest.param(other_volume, "birth-other-volume", marks=pytest.mark.long),
        pytest.param(wrong_magic, "birth-no-volume", marks=pytest.mark.long),
        pytest.param(missing, "birth-no-volume", marks=pytest.mark.long),
        pytest.param(noise, "birth-no-volume", marks=pytest.mark.long),
        pytest.param(one_sector_less, "birth-other-volume", marks=pytest.mark.long),
        pytest.param(first_block, "birth-other-volume", marks=pytest.mark.long),
        pytest.param(damaged, "birth-other-volume", marks=pytest.mark.long),
    ],
)
def test_a_used_volume_that_is_not_there_is_no_reason_to_start_afresh(
    owner: Estate, used: Vm, change: Callable[[Vm, Estate], None], code: str
) -> None:
    vm = used.twin()
    change(vm, owner)
    ended = refused(vm)
    assert (ended.exit_code, ended.code) == (3, code)
    assert "first booted with" in ended.hint
    shutil.copyfile(used.disk, vm.disk)
    with vm.boot() as instance:
        instance.ready()


@pytest.mark.long
def test_somebodys_volume_is_not_formatted_for_a_new_row(owner: Estate, used: Vm) -> None:
    vm = owner.vm()
    (vm.state / "host").mkdir(mode=0o700)
    shutil.copyfile(used.disk, vm.disk)
    ended = refused(vm)
    assert (ended.exit_code, ended.code) == (3, "birth-somebodys-volume")
    assert "wipe" in ended.hint
    assert vm.row()["state"] == "new"
    vm.disk.unlink()
    with vm.boot() as instance:
        instance.ready()
    assert vm.row()["state"] == "active"


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        "directory",
        "device",
        "missing",
        "directory, direct",
        "device, direct",
        "missing, direct",
        "nobody listens",
        "not a disk",
    ],
)
def test_what_is_no_disk_is_refused(used: Vm, place: Path, kind: str) -> None:
    vm = used.twin()
    words = {
        "directory": f"file:{place}",
        "device": "file:/dev/full",
        "missing": f"file:{place / 'none'}",
        "directory, direct": f"direct:{place}",
        "device, direct": "direct:/dev/full",
        "missing, direct": f"direct:{place / 'none'}",
        "nobody listens": f"process:{place / 'none'}",
        "not a disk": f"process:{vm.estate.serial}",  # a proxy listens there
    }
    ended = refused(vm, options=("--disk", words[kind]))
    expected = {"device": "disk-kind", "device, direct": "disk-kind", "not a disk": "block-io"}.get(kind, "disk-open")
    assert (ended.exit_code, ended.code) == (1, expected)


# --- the serial line ---------------------------------------------------------------------------------------------


def _answer(body: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(body), **changes}).encode()


def no_token(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    return _answer(answer, token=None) if number == 1 else answer


def foreign_token(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    if number != 1:
        return answer
    claims = from_base64_url(json.loads(answer)["token"]["Jwt"].split(".")[1], what="claims")
    return _answer(answer, token={"Jwt": SigningKey(ec.generate_private_key(ec.SECP384R1())).sign_token(claims)})


def edited_token(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    if number != 1:
        return answer
    head, claims, signature = json.loads(answer)["token"]["Jwt"].split(".")
    edited = from_base64_url(claims, what="claims").replace(b'"active"', b'"new"')
    return _answer(answer, token={"Jwt": f"{head}.{base64_url(edited)}.{signature}"})


def swapped_key(number: int, body: bytes, ask: Ask) -> Answer:
    if number != 1:
        return ask(body)
    mine = EphemeralKey.generate()
    return ask(_answer(body, key={"x": base64_std(mine.x), "y": base64_std(mine.y)}))


def swapped_jwe(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    if number != 1:
        return answer
    request, honest_answer = AttestationRequest.parse(body), AttestationAnswer.parse(answer)
    forged = jwe.encrypt(bytes(32), recipient_x=request.key_x, recipient_y=request.key_y)
    return AttestationAnswer(
        success=True, secret=forged.ciphertext, decryption=forged.decryption(), token=honest_answer.token
    ).pack()


def broken_jwe(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    if number != 1:
        return answer
    parsed = AttestationAnswer.parse(answer)
    assert parsed.secret is not None
    return _answer(answer, secret=base64_std(bytes([parsed.secret[0] ^ 1]) + parsed.secret[1:]))


def no_key(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    return _answer(answer, secret=None, decryption=None) if number == 1 else answer


def with_parameters(*names: str, challenge_bytes: int = 32) -> Script:
    def script(number: int, _body: bytes, _ask: Ask) -> Answer:
        assert number == 0, "a report was asked for"
        return NegotiationAnswer(challenge=bytes(challenge_bytes), parameters=names).pack()

    return script


def garbage(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 40)


def huge_frame(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return Raw((1 << 62).to_bytes(8, "little") + bytes(4096))


def empty_frame(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return b""


def no_object(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return b"[" * 100_000


def hangs_up(_number: int, _body: bytes, _ask: Ask) -> Answer:
    raise HangUp


def cut_in_a_frame(number: int, body: bytes, ask: Ask) -> Answer:
    answer = ask(body)
    return answer if number == 0 else Raw(len(answer).to_bytes(8, "little") + answer[:-1])


def hangs_up_later(number: int, body: bytes, ask: Ask) -> Answer:
    if number == 1:
        raise HangUp
    return ask(body)


def says_no(number: int, body: bytes, ask: Ask) -> Answer:
    return ask(body) if number == 0 else AttestationAnswer(success=False, reason="because").pack()


def silent(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return SILENT


def endless(_number: int, _body: bytes, _ask: Ask) -> Answer:
    return Raw((1 << 20).to_bytes(8, "little") + b" " * 1024)  # announces a mebibyte and never brings it


EXACT = ("EcPublicKeyBytes", "Challenge")
quick, late = pytest.param, pytest.mark.long


@pytest.mark.parametrize(
    ("script", "exit_code", "code"),
    [
        quick(no_token, 3, "attestation-no-token"),
        quick(foreign_token, 3, "token-signature", marks=late),
        quick(swapped_key, 3, "attestation-refused", marks=late),
        quick(swapped_jwe, 3, "attestation-confirmation"),
        quick(huge_frame, 1, "frame-too-long", marks=late),
        quick(edited_token, 3, "token-signature", marks=late),
        quick(broken_jwe, 3, "jwe-decrypt", marks=late),
        quick(no_key, 1, "attestation-incomplete", marks=late),
        quick(with_parameters(), 1, "attestation-params", id="params-empty", marks=late),
        quick(with_parameters(*EXACT[::-1]), 1, "attestation-params", id="params-reversed", marks=late),
        quick(with_parameters(*EXACT, *EXACT), 1, "attestation-params", id="params-doubled", marks=late),
        quick(with_parameters(*EXACT, challenge_bytes=31), 1, "attestation-challenge", id="challenge-31", marks=late),
        quick(with_parameters(*EXACT, challenge_bytes=65), 1, "attestation-challenge", id="challenge-65", marks=late),
        quick(garbage, 1, "frame-too-long", marks=late),
        quick(empty_frame, 1, "json-malformed", marks=late),
        quick(no_object, 1, "json-malformed", marks=late),
        quick(hangs_up, 1, "channel-closed", marks=late),
        quick(hangs_up_later, 1, "channel-closed", marks=late),
        quick(says_no, 3, "attestation-refused", marks=late),
    ],
)
def test_a_dishonest_proxy_gets_nowhere(used: Vm, script: Script, exit_code: int, code: str) -> None:
    vm = used.twin()
    ended = refused(vm, script=script)
    assert (ended.exit_code, ended.code) == (exit_code, code)


def no_acknowledgement(number: int, body: bytes, ask: Ask) -> Answer:
    return ask(body) if number < 2 else SILENT


def half_a_header(number: int, body: bytes, ask: Ask) -> Answer:
    return ask(body) if number < 2 else Raw(bytes(7))


@pytest.mark.long
@pytest.mark.timeout(200)
def test_silence_on_the_line_ends_at_a_deadline(owner: Estate, used: Vm) -> None:
    """All at once, because each takes the minute that an honest broker is given."""
    cases: list[tuple[Vm, Script]] = [(used.twin(), script) for script in (silent, endless, cut_in_a_frame)]
    cases += [(owner.vm(), script) for script in (no_acknowledgement, half_a_header)]
    with contextlib.ExitStack() as stack:
        instances = []
        for vm, script in cases:
            middle = stack.enter_context(vm.middleman(script))
            instances.append(stack.enter_context(vm.boot(serial=middle.path)))
        for instance in instances:
            ended = instance.ended(seconds=120)
            assert (ended.exit_code, ended.code) == (1, "channel-timeout")
            assert instance.find("ready") is None
    for vm, _ in cases:
        with vm.boot() as instance:
            instance.ready()


def test_a_replayed_session_is_refused(used: Vm) -> None:
    """Every byte that a genuine proxy said once, said again to the next boot."""
    vm = used.twin()
    with vm.middleman() as middle, vm.boot(serial=middle.path) as instance:
        instance.ready()
        instance.stop()
        recorded = list(middle.told)
    assert len(recorded) == 2

    def replay(number: int, _body: bytes, _ask: Ask) -> Answer:
        return recorded[number]

    ended = refused(vm, script=replay)
    assert (ended.exit_code, ended.code) == (3, "attestation-other-key")

    def old_answer(number: int, body: bytes, ask: Ask) -> Answer:
        return ask(body) if number == 0 else recorded[1]

    ended = refused(vm, script=old_answer)
    assert (ended.exit_code, ended.code) == (3, "attestation-other-challenge")


@pytest.mark.long
def test_another_vms_answer_is_refused(owner: Estate, used: Vm) -> None:
    """A genuine answer of the same broker to another VM at the same time."""
    vm, other = used.twin(), owner.vm()
    with other.middleman() as middle, other.boot(serial=middle.path) as instance:
        instance.ready()
        theirs = middle.told[1]

    def script(number: int, body: bytes, ask: Ask) -> Answer:
        return theirs if number == 1 else ask(body)

    ended = refused(vm, script=script)
    assert (ended.exit_code, ended.code) == (3, "attestation-other-challenge")


def test_a_report_is_not_asked_for_before_the_parameters_are_right(used: Vm) -> None:
    vm = used.twin()
    script = with_parameters("Challenge", challenge_bytes=164)
    with vm.middleman(script) as middle, vm.boot(serial=middle.path) as instance:
        ended = instance.ended()
        assert (ended.exit_code, ended.code) == (1, "attestation-params")
        assert len(middle.seen) == 1


# --- machine and launch ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_another_machine_is_refused(used: Vm, place: Path) -> None:
    """A chip of another simulated authority, its evidence genuine in itself: the row names the root it accepts."""
    vm = used.twin()
    shutil.rmtree(vm.state / "machine")
    mint(vm.state / "machine", authority_keys=authority_keys()[::-1])
    ended = refused(vm)
    assert (ended.exit_code, ended.code) == (3, "attestation-refused")
    assert ended.details["reason"] == "broker-evidence-refused"


@pytest.mark.long
def test_another_launch_configuration_is_refused(used: Vm) -> None:
    """Another name in the launch configuration is another HOST_DATA, for which there is no row."""
    vm = used.twin()
    identity = json.loads((vm.state / "state.json").read_text())
    (vm.state / "state.json").write_text(json.dumps({**identity, "name": "impostor"}))
    ended = refused(vm)
    assert (ended.exit_code, ended.code) == (3, "attestation-refused")


@pytest.mark.long
@pytest.mark.parametrize("where", ["proxy", "broker"])
def test_without_a_peer_the_boot_ends_with_its_name(used: Vm, place: Path, where: str) -> None:
    vm = used.twin()
    words = {"proxy": ("--serial", str(place / "none")), "broker": ("--broker", "http://127.0.0.1:9")}
    with Instance(vm.state, "--image", str(vm.estate.image), *words[where]) as instance:
        ended = instance.ended()
    expected: dict[str, tuple[Any, ...]] = {"proxy": (1, "serial-connect"), "broker": (1, "channel-closed")}
    assert (ended.exit_code, ended.code) == expected[where]
    assert ended.hint
    if where == "broker":
        told = instance.find("proxy-log")
        assert told is not None
        assert "the broker does not answer" in told["text"]
