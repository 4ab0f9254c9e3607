# SPDX-License-Identifier: MIT OR Apache-2.0
"""The whole service process under the real kernel code: fronts, clients that attack, death and replacement."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from svsm.abi.syscall import Endpoint, Transport
from svsm.formats import tpm
from svsm.formats.errors import BackendError, PolicyError, SvsmError
from svsm.formats.swtpm import Control
from svsm.kernel.tpm import MAX_TPM_CLIENTS, tpm_state_inode
from svsm.testing.file_store import MemoryFileStore
from svsm.testing.tpm_harness import Harness
from tests.unit.services.test_vtpm_library import library

GET_RANDOM = tpm.get_random(16)


def _word(value: int) -> bytes:
    return value.to_bytes(4, "big")


class Machine:
    """A harness that a second thread serves, so that the test can be a blocking client."""

    def __init__(self, store: MemoryFileStore) -> None:
        self.store = store
        self.harness = Harness(store)
        self.harness.until(lambda: bool(self.harness.ready_names))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self.harness.loop.run_once(0.02)

    def client(self, endpoint: Endpoint) -> socket.socket:
        """A connected client."""
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        done: list[bool] = []

        def connect() -> None:
            self.harness.tpm.connect(theirs.detach(), endpoint, Transport.UNIX)
            done.append(True)

        self.harness.loop.call_soon(connect)
        while not done:
            threading.Event().wait(0.002)
        return ours

    def service_pid(self) -> int:
        """The process of the service."""
        return self.harness.children[-1].pid

    def wait(self, condition: str) -> None:
        """Until the TPM is `condition` ("ready", "down")."""
        for _ in range(2000):
            if self.harness.tpm.ready is (condition == "ready"):
                return
            threading.Event().wait(0.005)
        raise TimeoutError(condition)

    def close(self) -> None:
        """The end."""
        self._stop.set()
        self._thread.join()
        self.harness.close()


@pytest.fixture
def store() -> MemoryFileStore:
    library()  # skips without libtpms
    return MemoryFileStore()


@pytest.fixture
def machine(store: MemoryFileStore) -> Iterator[Machine]:
    made = Machine(store)
    yield made
    made.close()


def _ask(client: socket.socket, command: bytes) -> bytes:
    client.sendall(command)
    response = client.recv(8192)
    while len(response) >= 10 and len(response) < int.from_bytes(response[2:6], "big"):
        response += client.recv(8192)
    return response


def _control(client: socket.socket, command: Control, body: bytes = b"") -> tuple[int, bytes]:
    client.sendall(_word(command) + body)
    answer = client.recv(4096)
    return int.from_bytes(answer[:4], "big"), answer[4:]


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_commands_raw_prefixed_split_and_pipelined(machine: Machine) -> None:
    with machine.client(Endpoint.DATA) as client:
        assert len(_ask(client, GET_RANDOM)) == 28
        client.sendall(GET_RANDOM * 5)
        received = b""
        while len(received) < 5 * 28:
            received += client.recv(4096)
        assert len({received[i : i + 28] for i in range(0, 140, 28)}) == 5
        for value in GET_RANDOM[:-1]:
            client.sendall(bytes([value]))
        assert len(_ask(client, GET_RANDOM[-1:])) == 28
        client.sendall(_word(8) + b"\0" + _word(len(GET_RANDOM)) + GET_RANDOM)
        answer = client.recv(4096)
        assert (answer[:4], len(answer), answer[-4:]) == (_word(28), 36, bytes(4))
        client.sendall(_word(20))
        assert client.recv(1) == b""


@pytest.mark.parametrize("garbage", [b"\x80\x01\xff\xff\xff\xff", bytes(64), b"GET / HTTP/1.1\r\n\r\n"])
def test_a_client_that_sends_garbage_is_dropped_and_others_go_on(machine: Machine, garbage: bytes) -> None:
    with machine.client(Endpoint.DATA) as good, machine.client(Endpoint.DATA) as bad:
        bad.sendall(garbage)
        assert bad.recv(100) == b""
        assert len(_ask(good, GET_RANDOM)) == 28


def test_a_client_that_does_not_read_stops_only_itself(machine: Machine) -> None:
    with machine.client(Endpoint.DATA) as deaf, machine.client(Endpoint.DATA) as good:
        deaf.settimeout(0.3)
        with pytest.raises(TimeoutError):
            deaf.sendall(GET_RANDOM * 100_000)
        assert len(_ask(good, GET_RANDOM)) == 28


def test_the_control_channel_as_qemu_uses_it(machine: Machine) -> None:
    with machine.client(Endpoint.CONTROL) as control:
        ours, theirs = socket.socketpair()
        socket.send_fds(control, [_word(Control.SET_DATAFD)], [theirs.fileno()])
        assert control.recv(4) == _word(0)
        theirs.close()
        ours.settimeout(10)
        assert tpm.response_code(_ask(ours, tpm.get_capability(6, 0x100, 1))) == 0
        assert _control(control, Control.GET_CAPABILITY) == (0, _word(0xBCBF))
        assert _control(control, Control.STOP)[0] == 0
        assert _ask(ours, GET_RANDOM) == tpm.failure_response()
        assert _control(control, Control.SET_BUFFERSIZE, _word(0)) == (0, _word(4096) + _word(2808) + _word(4096))
        assert _control(control, Control.SET_BUFFERSIZE, _word(3968)) == (0, _word(3968) + _word(2808) + _word(4096))
        assert _control(control, Control.INIT, _word(0))[0] == 0
        assert _ask(ours, GET_RANDOM) == tpm.failure_response(tpm.RC_INITIALIZE)
        assert _control(control, Control.GET_TPMESTABLISHED) == (0, bytes(4))
        assert _control(control, Control.SET_LOCALITY, b"\0\0\0\0")[0] == 0  # padded to four, as QEMU does
        assert _control(control, Control.SET_LOCALITY, b"\x05")[0] != 0
        assert tpm.response_code(_ask(ours, tpm.startup())) == 0
        assert len(_ask(ours, GET_RANDOM)) == 28
        assert _control(control, Control.SHUTDOWN)[0] == 0
        assert _ask(ours, GET_RANDOM) == tpm.failure_response()
        ours.close()


@pytest.mark.parametrize("command", [Control.GET_STATEBLOB, Control.SET_STATEBLOB, Control.STORE_VOLATILE])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_state_neither_leaves_nor_enters(machine: Machine, command: Control, kind: int) -> None:
    with machine.client(Endpoint.CONTROL) as control:
        answer = _control(control, command, _word(0) + _word(kind) + _word(0) * 2)
        assert answer == (10, b"")
        assert _control(control, Control.GET_CAPABILITY)[0] == 0


def test_a_dynamic_launch_is_measured(machine: Machine) -> None:
    read = tpm.CommandHeader(0x8001, 20, 0x17E).pack() + bytes.fromhex("00000001000b03000002")
    with machine.client(Endpoint.CONTROL) as control, machine.client(Endpoint.DATA) as data:
        before = _ask(data, read)
        assert _control(control, Control.HASH_START)[0] == 0
        assert _control(control, Control.HASH_DATA, _word(4) + b"code")[0] == 0
        assert _control(control, Control.HASH_END)[0] == 0
        after = _ask(data, read)
        assert tpm.response_code(after) == 0
        assert before[-32:] != after[-32:]
        assert _control(control, Control.GET_TPMESTABLISHED) == (0, b"\1\0\0\0")
        assert _control(control, Control.RESET_TPMESTABLISHED, b"\0")[0] != 0
        assert _control(control, Control.RESET_TPMESTABLISHED, b"\3")[0] == 0
        assert _control(control, Control.GET_TPMESTABLISHED) == (0, bytes(4))


def test_descriptors_other_than_one_stream_socket_are_closed_at_once(machine: Machine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(GET_RANDOM)
    left, right = socket.socketpair()
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    pipe, pipe_end = os.pipe()
    with machine.client(Endpoint.CONTROL) as control, open(secret, "r+b") as file:
        assert _control(control, Control.GET_CAPABILITY)[0] == 0
        before = _descriptors(machine.service_pid())
        folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        for sent in (
            [file.fileno()],
            [folder],
            [pipe],
            [datagram.fileno()],
            [left.fileno(), right.fileno()],
            [left.fileno()] * 3,
            [left.fileno()] * 253,
            [folder] * 253,
        ):
            socket.send_fds(control, [_word(Control.SET_DATAFD)], sent)
            assert control.recv(4) != _word(0)
            socket.send_fds(control, [_word(Control.GET_CAPABILITY)], sent)
            assert control.recv(8)[:4] == _word(0)
            assert _descriptors(machine.service_pid()) == before
        assert _control(control, Control.SET_DATAFD)[0] != 0
        assert _descriptors(machine.service_pid()) == before
        os.close(folder)
    for end in (left, right, datagram, other):
        end.close()
    os.close(pipe)
    os.close(pipe_end)


def test_descriptors_on_a_data_connection_are_never_received(machine: Machine) -> None:
    with machine.client(Endpoint.DATA) as client, open("/dev/null", "rb") as file:
        assert len(_ask(client, GET_RANDOM)) == 28
        before = _descriptors(machine.service_pid())
        socket.send_fds(client, [GET_RANDOM], [file.fileno()] * 50)
        assert len(client.recv(4096)) == 28
        assert _descriptors(machine.service_pid()) == before


def test_set_datafd_is_refused_over_tcp(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    machine.harness.loop.call_soon(
        lambda: machine.harness.tpm.connect(accepted.detach(), Endpoint.CONTROL, Transport.TCP)
    )
    with client:
        client.settimeout(10)
        assert _control(client, Control.GET_CAPABILITY)[0] == 0
        assert _control(client, Control.SET_DATAFD)[0] != 0


def test_clients_are_capped_and_places_come_back(machine: Machine) -> None:
    clients = [machine.client(Endpoint.DATA) for _ in range(MAX_TPM_CLIENTS)]
    for client in clients:
        assert len(_ask(client, GET_RANDOM)) == 28
    refused: list[SvsmError] = []
    ours, theirs = socket.socketpair()
    tried = threading.Event()

    def connect() -> None:
        try:
            machine.harness.tpm.connect(theirs.detach(), Endpoint.DATA, Transport.UNIX)
        except PolicyError as error:
            refused.append(error)
        finally:
            tried.set()

    machine.harness.loop.call_soon(connect)
    ours.settimeout(10)
    assert ours.recv(1) == b""
    assert tried.wait(10)
    assert refused[0].code == "client-limit"
    ours.close()
    for client in clients:
        client.close()
    for _ in range(50):  # the service gives its places back when it has seen the ends
        threading.Event().wait(0.05)
        with machine.client(Endpoint.DATA) as client:
            if len(_ask(client, GET_RANDOM)) == 28:
                return
    pytest.fail("no place came back")


def test_a_file_from_the_host_is_not_a_client(store: MemoryFileStore) -> None:
    harness = Harness(store)
    with open("/dev/null", "rb") as file:
        for descriptor in (os.dup(file.fileno()), socket.create_server(("127.0.0.1", 0)).detach()):
            with pytest.raises(PolicyError) as caught:
                harness.tpm.connect(descriptor, Endpoint.DATA, Transport.UNIX)
            assert caught.value.code == "client-descriptor"
    left, right = socket.socketpair()
    with pytest.raises(PolicyError):
        harness.tpm.connect(left.detach(), Endpoint.DATA, Transport.TCP)
    right.close()
    harness.close()


def test_a_killed_service_comes_back_and_answers_failure_until_init(machine: Machine) -> None:
    name = machine.harness.tpm.ek_name
    with machine.client(Endpoint.DATA) as client:
        assert len(_ask(client, GET_RANDOM)) == 28
        os.kill(machine.service_pid(), signal.SIGKILL)
        assert client.recv(1) == b""
    machine.wait("down")
    machine.wait("ready")
    assert machine.harness.tpm.ek_name == name
    with (
        machine.client(Endpoint.DATA) as client,
        machine.client(Endpoint.CONTROL) as control,
        machine.client(Endpoint.PLATFORM) as platform,
    ):
        for command in (GET_RANDOM, tpm.startup()):
            assert _ask(client, command) == tpm.failure_response()
        platform.sendall(_word(1))  # the simulator's clients power on at each connect: that is no reset
        assert platform.recv(4) == _word(0)
        assert _ask(client, GET_RANDOM) == tpm.failure_response()
        assert _control(control, Control.INIT, _word(0))[0] == 0
        assert tpm.response_code(_ask(client, tpm.startup())) == 0
        assert len(_ask(client, GET_RANDOM)) == 28


def test_a_store_that_fails_is_a_failure_until_init(machine: Machine) -> None:
    reset = bytes.fromhex("80020000001b000001394000000a00000009400000090000000000")  # DictionaryAttackLockReset
    with machine.client(Endpoint.DATA) as client, machine.client(Endpoint.CONTROL) as control:
        before = dict(machine.store.files)
        machine.store.fail = BackendError("no", code="block-io")
        define = bytes.fromhex(
            "80020000002d0000012a40000001000000094000000900000000000000000e01500001000b0206000600000008"
        )
        assert _ask(client, define) == tpm.failure_response()
        assert _ask(client, GET_RANDOM) == tpm.failure_response()
        assert machine.store.files == before
        _control(control, Control.INIT, _word(0))
        assert _ask(client, tpm.startup()) == tpm.failure_response()  # it would store
        machine.store.fail = None
        assert _control(control, Control.INIT, _word(0))[0] == 0
        assert tpm.response_code(_ask(client, tpm.startup())) == 0
        assert tpm.response_code(_ask(client, reset)) in (0, 0x922)


def test_the_guests_front(store: MemoryFileStore) -> None:
    harness = Harness(store, front="svsm", release=False)
    answers: list[bytes] = []

    def run(command: bytes) -> bytes:
        count = len(answers)
        harness.tpm.execute(command, answers.append)
        harness.until(lambda: len(answers) > count)
        return answers[-1]

    harness.tpm.execute(tpm.startup(), answers.append)
    harness.until(lambda: bool(harness.ready_names))
    assert not harness.loop.run_until(lambda: bool(answers), timeout_seconds=0.2)  # nothing leaves before release
    harness.tpm.release()
    harness.until(lambda: bool(answers))
    assert tpm.response_code(answers[0]) == 0
    assert len(run(GET_RANDOM)) == 28
    left, right = socket.socketpair()
    with pytest.raises(PolicyError) as caught:
        harness.tpm.connect(left.detach(), Endpoint.CONTROL, Transport.UNIX)
    assert caught.value.code == "client-front"
    right.close()

    os.kill(harness.children[-1].pid, signal.SIGKILL)
    harness.tpm.execute(GET_RANDOM, answers.append)
    harness.until(lambda: harness.tpm.restarts == 1 and harness.tpm.ready)
    assert run(GET_RANDOM) == tpm.failure_response()
    assert run(tpm.startup()) == tpm.failure_response()
    assert all(answer[6:10] == _word(tpm.RC_FAILURE) for answer in answers[2:])
    done: list[bytes | None] = []
    harness.tpm.submit(b"short", done.append)
    harness.until(lambda: bool(done))
    assert done == [tpm.failure_response(tpm.RC_COMMAND_SIZE)]
    harness.close()


def test_a_service_that_dies_with_commands_under_way_answers_each_once(store: MemoryFileStore) -> None:
    harness = Harness(store, front="svsm")
    harness.until(lambda: harness.tpm.ready)
    answers: list[bytes] = []
    os.kill(harness.children[-1].pid, signal.SIGSTOP)
    for _ in range(5):
        harness.tpm.execute(GET_RANDOM, answers.append)
    harness.loop.run_once(0.05)
    os.kill(harness.children[-1].pid, signal.SIGKILL)
    harness.until(lambda: len(answers) == 5)
    assert set(answers) == {tpm.failure_response()}
    harness.close()


def test_a_damaged_state_file_keeps_the_tpm_down_and_is_not_touched(store: MemoryFileStore) -> None:
    store.files[tpm_state_inode(0)] = b"somebody else's file"
    harness = Harness(store)
    harness.until(lambda: len(harness.lines) >= 2)
    assert "tpm-envelope" in harness.lines[0] or "record-truncated" in harness.lines[0]
    assert not harness.tpm.ready
    assert store.files == {tpm_state_inode(0): b"somebody else's file"}
    harness.close()


def test_an_orderly_stop_shuts_the_tpm_down_and_sigterm_too(store: MemoryFileStore) -> None:
    for by_signal in (False, True):
        harness = Harness(store)
        harness.until(lambda harness=harness: harness.tpm.ready)  # type: ignore[misc]
        child, stores = harness.children[0], store.replacements
        if by_signal:
            os.kill(child.pid, signal.SIGTERM)
            harness.until(lambda harness=harness: harness.tpm.restarts == 1)  # type: ignore[misc]
        harness.close()
        assert child.wait(5) == 0
        assert store.replacements > stores  # TPM2_Shutdown stores


@pytest.mark.parametrize("seed", range(3))
def test_random_clients_do_not_bring_the_service_down(machine: Machine, seed: int) -> None:
    random = Random(seed)
    pid = machine.service_pid()
    for _ in range(60):
        endpoint = random.choice(list(Endpoint))
        with machine.client(endpoint) as client:
            for _ in range(random.randrange(1, 6)):
                body = random.randbytes(random.choice((0, 1, 4, 8, 60, 5000)))
                if endpoint is Endpoint.CONTROL:
                    body = _word(random.randrange(0, 22)) + body
                elif endpoint is Endpoint.DATA:
                    size = random.choice((len(body) + 10, 12, 4096, 70000))
                    body = (
                        random.choice((b"\x80\x01", b"\x80\x02", b"\0\xc1", b"\0\0"))
                        + _word(size)
                        + _word(0x17B)
                        + body
                    )
                try:
                    client.sendall(body)
                except OSError:
                    break
    with machine.client(Endpoint.CONTROL) as control, machine.client(Endpoint.DATA) as client:
        assert _control(control, Control.INIT, _word(0))[0] == 0
        assert tpm.response_code(_ask(client, tpm.startup())) == 0
        assert len(_ask(client, GET_RANDOM)) == 28
    assert machine.service_pid() == pid
    assert machine.harness.tpm.restarts == 0
