# SPDX-License-Identifier: MIT OR Apache-2.0
"""libtpms, called through cffi. The only file that knows the library's C interface.

The library keeps one TPM in global variables, so there is one `Library` per process. It calls back for its
non-volatile state and for the locality. A callback that raises makes the library see TPM_FAIL: a store that was lost
is never taken for a store that happened. What was raised is kept in `failure` for the caller to look at.

**Executable memory.** A callback needs a few bytes of machine code made at run time, from memory that is writable and
executable at once: the measured loader provides for that before lock-down and gives the way (`executable`, see
`svsm.confine.callbacks`). All callbacks are made when the library is opened, six of them, and live for ever.

Not thread-safe, and never to be forked: a fork would share the random generator's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from svsm.formats.errors import BackendError
from svsm.services.vtpm import _libtpms_abi

__all__ = ["Library"]

ffi: Any = _libtpms_abi.ffi
"""C data is untyped by nature; the types end here."""

_TPM_2 = 1
_OK = 0
_FAIL = 9
_RETRY = 0x800
"""From loaddata: there is no such state."""
_PERMANENT = b"permall"


def _nothing_stored() -> bytes | None:
    return None


def _refuse_store(_: bytes) -> None:
    raise BackendError("no store is connected", code="tpm-no-store")


class Library:
    """The TPM library of this process.

    Args:
        path: Of libtpms.so.0; a bare name is looked up by the loader, ``/proc/self/fd/N`` is a memfd.
        executable: From the address of a callback to the one that C code shall call, or None: the same one.

    Attributes:
        load: Gives the permanent state, None when there is none yet (the library then manufactures a TPM).
        store: Takes the permanent state; returns when it is durable, raises when it is not.
        locality: Of the next command.
        failure: What the last failed callback raised; the caller resets it.
    """

    def __init__(self, path: str, *, executable: Callable[[int], int] | None = None) -> None:
        self.load: Callable[[], bytes | None] = _nothing_stored
        self.store: Callable[[bytes], None] = _refuse_store
        self.locality = 0
        self.failure: BaseException | None = None
        try:
            self._lib: Any = ffi.dlopen(path, ffi.RTLD_NOW | ffi.RTLD_LOCAL)
        except OSError as error:
            raise BackendError(
                "the TPM library cannot be loaded",
                code="tpm-library",
                hint="install libtpms (Debian: libtpms0)",
                reason=str(error),
            ) from None
        self._callbacks = self._make_callbacks()
        self._struct: Any = ffi.new("struct libtpms_callbacks *")
        for name, callback in self._callbacks.items():
            address = int(ffi.cast("uintptr_t", callback))
            setattr(self._struct, name, ffi.cast(_field_type(name), executable(address) if executable else address))
        self._struct.sizeOfStruct = ffi.sizeof("struct libtpms_callbacks")
        self._response: Any = ffi.new("unsigned char **")
        self._size: Any = ffi.new("uint32_t *")
        self._total: Any = ffi.new("uint32_t *")
        self._process: Any = self._lib.TPMLIB_Process
        self._registered = False

    def _make_callbacks(self) -> dict[str, Any]:
        def note(_kind: object, value: BaseException, _trace: object) -> None:
            self.failure = value

        made: dict[str, Any] = {}
        for name, function in (
            ("tpm_nvram_init", self._on_init),
            ("tpm_nvram_loaddata", self._on_load),
            ("tpm_nvram_storedata", self._on_store),
            ("tpm_nvram_deletename", self._on_delete),
            ("tpm_io_init", self._on_init),
            ("tpm_io_getlocality", self._on_locality),
        ):
            kind = _field_type(name)
            made[name] = ffi.callback(kind, function, error=_FAIL, onerror=note)
        return made

    @staticmethod
    def _on_init() -> int:
        return _OK

    def _on_load(self, data: Any, length: Any, _number: int, name: Any) -> int:
        if ffi.string(name) != _PERMANENT:
            return _RETRY
        state = self.load()
        if state is None:
            return _RETRY
        memory = self._lib.malloc(len(state))  # the library frees it
        if not memory:
            return _FAIL
        ffi.memmove(memory, state, len(state))
        data[0] = ffi.cast("unsigned char *", memory)
        length[0] = len(state)
        return _OK

    def _on_store(self, data: Any, length: int, _number: int, name: Any) -> int:
        if ffi.string(name) != _PERMANENT:
            return _FAIL
        self.store(bytes(ffi.buffer(data, length)))
        return _OK

    @staticmethod
    def _on_delete(_number: int, _name: Any, _must_exist: int) -> int:
        return _FAIL

    def _on_locality(self, modifier: Any, _number: int) -> int:
        modifier[0] = self.locality
        return _OK

    def main_init(self) -> int:
        """Power on. Returns the library's result, 0 when it worked."""
        if not self._registered:
            if self._lib.TPMLIB_ChooseTPMVersion(_TPM_2) or self._lib.TPMLIB_RegisterCallbacks(self._struct):
                return _FAIL
            self._registered = True
        return int(self._lib.TPMLIB_MainInit())

    def terminate(self) -> None:
        """Power off, without telling the TPM first."""
        self._lib.TPMLIB_Terminate()

    def process(self, command: bytes) -> bytes:
        """Execute one command; b"" when the library itself failed."""
        if self._process(self._response, self._size, self._total, command, len(command)):
            return b""
        return bytes(ffi.buffer(self._response[0], self._size[0]))

    def cancel(self) -> int:
        """Ask the running command to stop."""
        return int(self._lib.TPMLIB_CancelCommand())

    def set_buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """(size, minimum, maximum) of command and response buffers; `wanted` 0 asks only. While powered off."""
        minimum, maximum = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        return int(self._lib.TPMLIB_SetBufferSize(wanted, minimum, maximum)), minimum[0], maximum[0]

    def hash_start(self) -> int:
        """Begin a dynamic launch measurement."""
        return int(self._lib.TPM_IO_Hash_Start())

    def hash_data(self, data: bytes) -> int:
        """Continue it."""
        return int(self._lib.TPM_IO_Hash_Data(data, len(data)))

    def hash_end(self) -> int:
        """Finish it."""
        return int(self._lib.TPM_IO_Hash_End())

    def established(self) -> tuple[int, int]:
        """(result, flag): whether a dynamic launch happened."""
        flag = ffi.new("unsigned char *")
        return int(self._lib.TPM_IO_TpmEstablished_Get(flag)), flag[0]

    def reset_established(self) -> int:
        """Clear that flag; allowed at localities 3 and 4."""
        return int(self._lib.TPM_IO_TpmEstablished_Reset())


def _field_type(name: str) -> Any:
    for field, details in ffi.typeof("struct libtpms_callbacks").fields:
        if field == name:
            return details.type
    raise BackendError("the TPM library's declarations lack a callback", code="tpm-library", reason=name)
