# SPDX-License-Identifier: MIT OR Apache-2.0
"""One TPM: its life from manufacture to power-off, and what it answers when it may not run.

    prepare()    state file empty → manufacture (in memory, stored once, whole); EK name computed if not known
    power_on()   MainInit with the stored state, optionally TPM2_Startup(CLEAR)
    execute()    one command; permanent state is durable before the response is returned
    power_off()  orderly (TPM2_Shutdown(CLEAR) first) or not

**PCR lifetime.** PCRs start anew only together with the guest. `prepare` therefore also drops what an earlier guest
saved with TPM2_Shutdown(STATE): a new guest could otherwise resume another one's PCRs with TPM2_Startup(STATE). For
the same reason the orderly shutdown that svsm itself makes is CLEAR, never STATE: it comes at the end of a guest, and
it replaces a STATE that the guest saved for a resume within its life.
A TPM that is not powered on, or whose store failed, answers TPM_RC_FAILURE to everything.

**The EK name** is computed by a second, throw-away start of the same state whose stores go nowhere, so that the
guest's TPM never notices: no transient object, no counter, no random number of it is used. A TPM2_ChangeEPS marks
the name unknown *before* the command runs; the next start computes it anew, unless the owner has set an endorsement
authorisation in the meantime, which svsm does not have: then the TPM runs without a known name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from svsm.formats import tpm as commands
from svsm.formats.errors import BackendError, StateError
from svsm.formats.tpm_envelope import TpmEnvelope
from svsm.services.syscalls import KernelGone
from svsm.services.vtpm.library import Library

__all__ = ["DictionaryAttack", "Tpm"]

_RC_RETRY = 0x922
_MAX_RETRIES = 4
_FAILURE = commands.failure_response()


@dataclasses.dataclass(frozen=True, slots=True)
class DictionaryAttack:
    """Protection against guessing authorisation values, set when a TPM is manufactured."""

    max_tries: int = 32
    """Wrong guesses until the TPM locks."""
    recovery_seconds: int = 600
    """One guess is forgiven after this time of TPM operation."""
    lockout_recovery_seconds: int = 86400
    """After a wrong lockout authorisation it stays unusable this long."""


class Tpm:
    """The TPM of this process.

    Args:
        library: The loaded TPM library.
        load: The state file's contents, b"" when it has none.
        store: Replaces the state file; returns when that is durable, raises when it is not known to be.
        protection: Dictionary-attack parameters of a TPM that is manufactured now.
    """

    def __init__(
        self,
        library: Library,
        load: Callable[[], bytes],
        store: Callable[[bytes], None],
        *,
        protection: DictionaryAttack | None = None,
    ) -> None:
        self._library = library
        self._load = load
        self._store = store
        self._protection = protection or DictionaryAttack()
        self._envelope: TpmEnvelope | None = None
        self._running = False
        self._shut_down = False

    @property
    def running(self) -> bool:
        """Whether commands reach the TPM."""
        return self._running

    @property
    def ek_name(self) -> bytes | None:
        """Name of the RSA-2048 EK (34 bytes) after `prepare`; None when it cannot be had (see the module)."""
        return None if self._envelope is None else self._envelope.ek_name

    def prepare(self, *, new_guest: bool) -> None:
        """Have a stored TPM with a known EK name.

        Args:
            new_guest: Drop the state that an earlier guest saved for a resume; False after a crash of this process.

        Raises:
            FormatError, IntegrityError: ``tpm-envelope-*``: the state file is not believed, and not overwritten.
            BackendError: ``tpm-manufacture``, ``tpm-state``, ``syscall-*``.
        """
        stored = self._load()
        envelope = TpmEnvelope.parse(stored) if stored else TpmEnvelope(self._manufacture(), 0, None)
        if new_guest and stored and self._resumable(envelope.state):
            envelope = dataclasses.replace(envelope, state=self._without_saved_state(envelope.state))
        if envelope.ek_name is None:
            envelope = dataclasses.replace(envelope, ek_name=self._compute_ek_name(envelope.state))
        self._envelope = envelope
        if envelope.pack() != stored:
            self._replace(envelope)

    def power_on(self, *, startup: bool) -> None:
        """Power cycle: whatever was volatile is gone.

        Raises:
            BackendError: ``tpm-state`` when the library refuses the stored state.
            StateError: ``tpm-not-prepared``.
        """
        self.power_off(orderly=False)
        if self._envelope is None:
            raise StateError("the TPM has no state yet", code="tpm-not-prepared")
        stored = self._load()  # after a failed store only the file knows what is stored
        self._envelope = TpmEnvelope.parse(stored)
        self._library.load = self._current_state
        self._library.store = self._store_state
        self._library.locality = 0
        self._init("tpm-state")
        self._running = True
        self._shut_down = False
        if startup:
            self._expect(self.execute(commands.startup()), "tpm-state")

    def power_off(self, *, orderly: bool) -> None:
        """Stop the TPM; `orderly` tells it first, so that it does not count an unexpected power loss."""
        if not self._running:
            return
        if orderly and not self._shut_down:
            self.execute(commands.shutdown(commands.SU_CLEAR))
        if self._running:
            self._library.terminate()
        self._running = False

    def execute(self, command: bytes, locality: int = 0) -> bytes:
        """Run one command of at most 4096 bytes.

        Raises:
            KernelGone: The kernel went away during a store; there is nobody to answer for.
        """
        if not self._running:
            return _FAILURE
        library = self._library
        library.locality = locality
        code = command[6:10]
        if code == _CHANGE_EPS and self._envelope is not None:
            self._envelope = dataclasses.replace(self._envelope, ek_name=None)
        response = library.process(command)
        if library.failure is not None or not response:
            self._fail()
            return _FAILURE
        self._shut_down = code == _SHUTDOWN and command[10:] == _CLEAR and response[6:10] == _SUCCESS
        return response

    def _fail(self) -> None:
        """A store was lost, or the library gave up: off until the next power cycle."""
        failure, self._library.failure = self._library.failure, None
        self._library.terminate()
        self._running = False
        if isinstance(failure, KernelGone):
            raise failure

    # --- calls of the control channel that are no TPM commands ---

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """(size, minimum, maximum) of the command buffer; `wanted` 0 asks only.

        Raises:
            StateError: ``tpm-running`` when it would change while the TPM runs.
        """
        if wanted and self._running:
            raise StateError("the buffer size cannot change while the TPM runs", code="tpm-running")
        return self._library.set_buffer_size(wanted)

    def established(self) -> tuple[int, int]:
        """(result, flag) of GET_TPMESTABLISHED."""
        return self._library.established() if self._running else (commands.RC_FAILURE, 0)

    def special(self, call: Callable[[Library], int], *, locality: int) -> int:
        """Run one of the library's side entrances (hash sequence, established flag) at a locality."""
        if not self._running:
            return commands.RC_FAILURE
        self._library.locality = locality
        result = call(self._library)
        if self._library.failure is not None:
            self._fail()
            return commands.RC_FAILURE
        return result

    # --- state ---

    def _current_state(self) -> bytes | None:
        return None if self._envelope is None else self._envelope.state

    def _store_state(self, state: bytes) -> None:
        """The library's store, in the middle of a command."""
        if self._envelope is None:
            raise StateError("the TPM has no state yet", code="tpm-not-prepared")
        envelope = self._envelope
        if state == envelope.state and envelope.ek_name is not None:
            return  # stored already, byte for byte
        self._replace(TpmEnvelope(state, envelope.sequence + 1, envelope.ek_name))

    def _replace(self, envelope: TpmEnvelope) -> None:
        self._store(envelope.pack())
        self._envelope = envelope

    def _init(self, code: str) -> None:
        self._library.failure = None
        result = self._library.main_init()
        failure, self._library.failure = self._library.failure, None
        if isinstance(failure, KernelGone):
            raise failure
        if result or failure is not None:
            self._library.terminate()
            raise BackendError("the TPM library refuses the TPM's state", code=code, result=result)

    @contextmanager
    def _scratch(self, state: bytes | None) -> Iterator[list[bytes]]:
        """Run the library on a copy of `state` (None: manufacture); yields the stores, the last is what it became."""
        if self._running:
            raise StateError("the TPM is running", code="tpm-running")
        stores: list[bytes] = [] if state is None else [state]
        self._library.load = lambda: stores[-1] if stores else None
        self._library.store = stores.append
        self._library.locality = 0
        self._init("tpm-manufacture" if state is None else "tpm-state")
        try:
            yield stores
        finally:
            self._library.terminate()

    def _expect(self, response: bytes, code: str) -> bytes:
        result = commands.response_code(response) if response else commands.RC_FAILURE
        if result != commands.RC_SUCCESS:
            raise BackendError("the TPM refused a command of its setup", code=code, result=result)
        return response

    def _setup(self, command: bytes, code: str) -> bytes:
        for _ in range(_MAX_RETRIES):
            response = self._library.process(command)
            if not response or commands.response_code(response) != _RC_RETRY:
                break
        return self._expect(response, code)

    def _manufacture(self) -> bytes:
        protection = self._protection
        with self._scratch(None) as stores:
            self._setup(commands.startup(), "tpm-manufacture")
            self._setup(
                commands.dictionary_attack_parameters(
                    max_tries=protection.max_tries,
                    recovery_seconds=protection.recovery_seconds,
                    lockout_recovery_seconds=protection.lockout_recovery_seconds,
                ),
                "tpm-manufacture",
            )
            self._setup(commands.shutdown(), "tpm-manufacture")
        return stores[-1]

    def _compute_ek_name(self, state: bytes) -> bytes | None:
        with self._scratch(state):
            self._setup(commands.startup(), "tpm-state")
            response = self._library.process(commands.create_ek())
            if not response or commands.response_code(response) != commands.RC_SUCCESS:
                return None
            return commands.ek_name(commands.parse_create_primary(response)[1])

    def _resumable(self, state: bytes) -> bool:
        with self._scratch(state):
            response = self._library.process(commands.startup(commands.SU_STATE))
        return bool(response) and commands.response_code(response) == commands.RC_SUCCESS

    def _without_saved_state(self, state: bytes) -> bytes:
        with self._scratch(state) as stores:
            self._setup(commands.startup(), "tpm-state")
            self._setup(commands.shutdown(), "tpm-state")
        return stores[-1]


_CHANGE_EPS = commands.CC_CHANGE_EPS.to_bytes(4, "big")
_SHUTDOWN = commands.CC_SHUTDOWN.to_bytes(4, "big")
_CLEAR = commands.SU_CLEAR.to_bytes(2, "big")
_SUCCESS = commands.RC_SUCCESS.to_bytes(4, "big")
