# SPDX-License-Identifier: MIT OR Apache-2.0
"""What storage needs of the process it runs in: few system calls, and none of the standard library's OpenSSL."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import peer

_PROGRAM = """
import sys
sys.modules["_hashlib"] = None  # as in the measured payload's processes
sys.modules["_ssl"] = None
import os
from svsm.storage.drivers.file import FileDevice
from svsm.storage.volume import Volume
descriptor = int(sys.argv[1])
def work():
    volume = Volume.create(FileDevice(os.dup(descriptor)), b"key", salt=b"salt")
    for turn in range(3):
        with volume.transaction() as transaction:
            transaction.write(16 + turn, b"contents" * 1000)
    volume.close()
    again = Volume.open(FileDevice(descriptor), b"key")
    assert again.read(18) == b"contents" * 1000
    again.close()
work.__code__  # everything is imported by now
os.write(2, b"MARK\\n")
work()
os.write(2, b"MARK\\n")
libcrypto = [line for line in open("/proc/self/maps") if "libcrypto" in line]
assert not libcrypto, libcrypto
print("done")
"""

ALLOWED = {
    *("pread64", "pwrite64", "fdatasync", "flock", "fstat", "newfstatat", "lseek", "close", "dup", "write"),
    *("mmap", "munmap", "mremap", "brk", "madvise", "futex", "getrandom", "fcntl", "clock_gettime", "rt_sigaction"),
}


def _disk(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(bytes(64 << 10))
    return path


def test_without_the_systems_libcrypto(tmp_path: Path) -> None:
    with _disk(tmp_path).open("r+b") as disk:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(disk.fileno())],
            pass_fds=[disk.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.interop
def test_system_calls(tmp_path: Path) -> None:
    strace, trace = peer("strace"), tmp_path / "trace"
    with _disk(tmp_path).open("r+b") as disk:
        command = [str(strace), "-f", "-o", str(trace), sys.executable, "-c", _PROGRAM, str(disk.fileno())]
        done = subprocess.run(
            command, pass_fds=[disk.fileno()], capture_output=True, text=True, timeout=60, check=False
        )
    if "ptrace" in done.stderr.lower():
        pytest.skip("this machine does not let strace trace")
    _, work, _ = trace.read_text().split('write(2, "MARK\\n", 5')
    names = set(re.findall(r"^\d+ +(\w+)\(", work, re.M))
    assert {"pread64", "pwrite64", "fdatasync", "flock"} <= names
    assert names <= ALLOWED
