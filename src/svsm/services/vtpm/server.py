# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM's event loop: the kernel's events on one side, the clients of its front on the other.

Two fronts, one per process, said by the launch configuration:

* ``socket``: clients speak the swtpm-style protocol; the host stands in the guest's place. The TPM is started
  (TPM2_Startup) when the process is, as a PC's firmware would, and again powered by CMD_INIT.
* ``svsm``: commands come from the kernel, which has them from the VMPL2 guest by the SVSM vTPM protocol. There is
  no control channel and no client. The guest's firmware starts the TPM; the kernel says when its guest was reset.

A process that replaces one that died (``start`` = ``failed``) keeps its TPM off: every command is answered
TPM_RC_FAILURE until the guest is reset (svsm) or CMD_INIT comes (socket), because PCRs that start anew under a
running guest would make every quote a lie. mssim's POWER_ON alone is no reset: its clients send it at each connect.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from svsm.abi.descriptors import client_socket
from svsm.abi.syscall import Call, Endpoint, Event, EventKind, Status, encode_answer, encode_handle
from svsm.formats import swtpm
from svsm.formats.errors import PolicyError, ProtocolError, SvsmError
from svsm.formats.swtpm import Control, ControlMessage, PlatformSignal
from svsm.formats.tpm import RC_FAILURE
from svsm.services.syscalls import Kernel, KernelGone
from svsm.services.vtpm.clients import Client, ControlClient, DataClient, PlatformClient
from svsm.services.vtpm.library import Library
from svsm.services.vtpm.tpm import Tpm

__all__ = ["MAX_CLIENTS", "Server"]

MAX_CLIENTS = 32
_MAX_LOCALITY = 4
_BAD_LOCALITY = 0x3D

_CLIENT_KINDS: dict[Endpoint, type[Client]] = {
    Endpoint.DATA: DataClient,
    Endpoint.CONTROL: ControlClient,
    Endpoint.PLATFORM: PlatformClient,
}


class Server:
    """Serves one TPM until the kernel says stop or goes away.

    Args:
        kernel: The syscall socket.
        tpm: Prepared; powered on already unless this is a restart after a crash.
        events: Handle of this process's event queue.
        sockets: Whether the front is ``socket``.
    """

    def __init__(self, kernel: Kernel, tpm: Tpm, *, events: int, sockets: bool) -> None:
        self._kernel = kernel
        self._tpm = tpm
        self._events = events
        self._sockets = sockets
        self._poll = select.epoll()
        self._clients: dict[int, Client] = {}
        self._data_clients = 0
        self._locality = 0
        self._powered = True
        self._waiting = 0
        self._stopping = False
        self._idle = False

    def stop(self) -> None:
        """Make `run` return soon; from a signal handler it also wakes the loop."""
        self._stopping = True
        if self._idle:
            self._idle = False
            raise InterruptedError

    def run(self) -> None:
        """The loop. Powers the TPM off in order before it returns.

        Raises:
            KernelGone: There was no orderly end: the kernel closed the socket.
        """
        self._poll.register(self._kernel.fileno(), select.EPOLLIN)
        self._waiting = self._kernel.submit(Call.WAIT, encode_handle(self._events))
        try:
            while not self._stopping:
                if not self._take_events():
                    self._wait()
            self._tpm.power_off(orderly=True)
        finally:
            for client in list(self._clients.values()):
                client.close()
            self._poll.close()

    def _wait(self) -> None:
        try:
            self._idle = True
            if self._stopping:
                return
            ready = self._poll.poll(-1)
        except InterruptedError:
            return
        finally:
            self._idle = False
        for descriptor, mask in ready:
            client = self._clients.get(descriptor)
            if client is None:
                if descriptor == self._kernel.fileno():
                    self._kernel.poll(block=False)
                continue
            before = client.interest
            if not client.ready(mask):
                self._drop(client)
            elif client.interest != before:
                self._poll.modify(descriptor, client.interest)

    def _take_events(self) -> bool:
        """Handle the event that came, if one did (perhaps during a store) and ask for the next."""
        reply = self._kernel.completed(self._waiting)
        if reply is None:
            return False
        if reply.status is not Status.OK:
            raise ProtocolError("the kernel has no events for us", code="syscall-event", status=reply.status.name)
        event = Event.parse(reply.body)
        descriptor = self._kernel.take_descriptor() if reply.descriptors else None
        self._waiting = self._kernel.submit(Call.WAIT, encode_handle(self._events))
        self._happened(event, descriptor)
        return True

    def _happened(self, event: Event, descriptor: int | None) -> None:
        if event.kind is EventKind.CONNECTION and descriptor is not None:
            self._connected(event, descriptor)
        elif event.kind is EventKind.COMMAND:
            response = self._tpm.execute(event.command, event.locality)
            self._kernel.call(Call.ANSWER, encode_answer(self._events, event.command_id, response))
        elif event.kind is EventKind.STOP:
            self._stopping = True

    def _connected(self, event: Event, descriptor: int) -> None:
        try:
            connection = client_socket(descriptor)
        except PolicyError:
            self._kernel.close_handle(event.handle)
            return
        if not self._sockets or len(self._clients) >= MAX_CLIENTS:
            connection.close()
            self._kernel.close_handle(event.handle)
            return
        self._add(_CLIENT_KINDS[event.endpoint](connection, event.handle, self))

    def _add(self, client: Client) -> None:
        self._clients[client.fileno()] = client
        self._data_clients += isinstance(client, DataClient)
        self._poll.register(client.fileno(), client.interest)

    def _drop(self, client: Client) -> None:
        del self._clients[client.fileno()]
        self._data_clients -= isinstance(client, DataClient)
        self._poll.unregister(client.fileno())
        client.close()
        if client.handle:
            self._kernel.close_handle(client.handle)

    # --- the Front interface of the clients ---

    def quiet(self) -> bool:
        """Whether one data client may have the process to itself for a moment."""
        return self._data_clients == 1 and not self._kernel.has_completed

    def execute(self, command: bytes, locality: int | None) -> bytes:
        """A command of a data client."""
        return self._tpm.execute(command, self._locality if locality is None else locality)

    def control(self, message: bytes, descriptor: int | None, *, unix: bool) -> bytes:
        """Answer a control message."""
        try:
            parsed = ControlMessage.parse(message)
        except ProtocolError as error:
            _discard(descriptor)
            unknown = error.code == "swtpm-control-unknown"
            return swtpm.result_reply(swtpm.RESULT_UNKNOWN if unknown else swtpm.RESULT_BAD_PARAMETER)
        if parsed.command is Control.SET_DATAFD:
            return swtpm.result_reply(self._set_data(descriptor, unix=unix))
        _discard(descriptor)
        try:
            return self._answer(parsed)
        except KernelGone:
            raise
        except SvsmError:
            return swtpm.result_reply(swtpm.RESULT_FAIL)

    def _answer(self, message: ControlMessage) -> bytes:
        command, tpm = message.command, self._tpm
        if command is Control.GET_CAPABILITY:
            return swtpm.capability_reply()
        if command is Control.GET_TPMESTABLISHED:
            return swtpm.established_reply(*tpm.established())
        if command is Control.GET_CONFIG:
            return swtpm.result_reply(swtpm.RESULT_OK) + bytes(4)
        if command is Control.SET_BUFFERSIZE:
            size, minimum, maximum = tpm.buffer_size(message.number)
            return swtpm.buffer_size_reply(swtpm.RESULT_OK, size, minimum, maximum)
        return swtpm.result_reply(self._perform(message))

    def _perform(self, message: ControlMessage) -> int:
        command, tpm = message.command, self._tpm
        if command is Control.INIT:
            return self._power(lambda: tpm.power_on(startup=False))
        if command in (Control.STOP, Control.SHUTDOWN):
            return self._power(lambda: tpm.power_off(orderly=command is Control.SHUTDOWN))
        if command is Control.SET_LOCALITY:
            if message.number > _MAX_LOCALITY:
                return _BAD_LOCALITY
            self._locality = message.number
            return swtpm.RESULT_OK
        if command is Control.RESET_TPMESTABLISHED:
            return tpm.special(Library.reset_established, locality=message.number)
        if command is Control.HASH_START:
            return tpm.special(Library.hash_start, locality=_MAX_LOCALITY)
        if command is Control.HASH_DATA:
            return tpm.special(lambda library: library.hash_data(message.data), locality=_MAX_LOCALITY)
        if command is Control.HASH_END:
            return tpm.special(Library.hash_end, locality=_MAX_LOCALITY)
        if command is Control.CANCEL_TPM_CMD:
            return swtpm.RESULT_OK  # one thread: no command is running when this is read
        return swtpm.RESULT_UNKNOWN

    def _power(self, change: Callable[[], None]) -> int:
        """A power change of the TPM; returns a result of the control channel."""
        try:
            change()
        except KernelGone:
            raise
        except SvsmError:
            return RC_FAILURE
        self._powered = self._tpm.running
        return swtpm.RESULT_OK

    def _set_data(self, descriptor: int | None, *, unix: bool) -> int:
        if descriptor is None:
            return swtpm.RESULT_BAD_PARAMETER
        if not unix or len(self._clients) >= MAX_CLIENTS:
            _discard(descriptor)
            return swtpm.RESULT_FAIL
        try:
            connection = client_socket(descriptor)
        except PolicyError:
            return swtpm.RESULT_BAD_PARAMETER
        self._add(DataClient(connection, 0, self))
        return swtpm.RESULT_OK

    def platform(self, signal: int) -> bytes:
        """Answer a signal of the simulator's platform port."""
        result = swtpm.RESULT_OK
        if signal in (PlatformSignal.SESSION_END, PlatformSignal.STOP):
            return b""
        if signal == PlatformSignal.POWER_OFF:
            result = self._power(lambda: self._tpm.power_off(orderly=False))
        elif signal == PlatformSignal.RESET or (signal == PlatformSignal.POWER_ON and not self._powered):
            result = self._power(lambda: self._tpm.power_on(startup=False))
        return swtpm.result_reply(result)


def _discard(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
