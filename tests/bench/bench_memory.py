# SPDX-License-Identifier: MIT OR Apache-2.0
"""Memory of a running system, process by process; guest memory not counted.

    python -m tests.bench memory          (as root: other processes' memory maps are read)

PSS (`/proc/PID/smaps`) charges a page shared by n processes with 1/n to each, so the sum over the system's processes
and nobody else is what the system costs. The three memory files that are the virtual machine's memory do not count.
Other memory files do (the payload's archive and the shared objects copied from it), but PSS sees of them only what
is mapped and touched; the rest is a row of its own.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

from svsm.confine.identity import role_uid
from svsm.confine.lists import Role
from tests.bench.report import Result, Row
from tests.bench.system import System, family

__all__ = ["bench"]

_TARGET_MIB = 250
_MIB = 1 << 20
_GUEST = re.compile(r"/memfd:svsm-(private|vmpl2|shared)\b")
_MEMFD = "/memfd:"
_SETTLE_SECONDS = 1.0
_SERVICES = 2


def _roles() -> dict[int, str]:
    """Role by uid, where root started the system."""
    names: dict[int, str] = {}
    for role in Role:
        for number in range(_SERVICES if role is Role.SERVICE else 1):
            uid = role_uid(role, number)
            if uid is not None:
                names[uid] = f"{role.value} {number}" if role is Role.SERVICE else role.value
    return names


def _pss(pid: int) -> tuple[int, int]:
    """PSS in bytes of a process without guest memory: all of it, and what of it are memory files."""
    total = files = 0
    name = ""
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as lines:
        for line in lines:
            words = line.split(None, 5)
            if not words[0].endswith(":"):
                name = words[5].strip() if len(words) > 5 else ""
            elif words[0] == "Pss:" and not _GUEST.match(name):
                total += int(words[1]) << 10
                files += int(words[1]) << 10 if name.startswith(_MEMFD) else 0
    return total, files


def _memory_files(pids: list[int]) -> tuple[int, int]:
    """Bytes behind the memory files that the processes hold or map: guest memory, and others; each counted once."""
    seen: dict[int, tuple[str, int]] = {}
    for pid in pids:
        for folder in (f"/proc/{pid}/fd", f"/proc/{pid}/map_files"):
            for entry in os.scandir(folder):
                try:
                    target = os.readlink(entry.path)
                    if target.startswith(_MEMFD):
                        status = os.stat(entry.path)
                        seen[status.st_ino] = (target, status.st_blocks * 512)
                except OSError:
                    continue
    guest = sum(size for target, size in seen.values() if _GUEST.match(target))
    return guest, sum(size for _, size in seen.values()) - guest


def bench() -> Result:
    """Boot, let it settle, look.

    Raises:
        RuntimeError: Without root.
    """
    if os.geteuid() != 0:
        raise RuntimeError("the memory of other users' processes can be read by root only")
    names = _roles()
    with tempfile.TemporaryDirectory(prefix="svsm-bench") as folder, System(Path(folder) / "state") as system:
        time.sleep(_SETTLE_SECONDS)
        pids = family(system.process.pid)
        rows: list[Row] = []
        total = mapped = 0
        for pid in pids:
            pss, files = _pss(pid)
            total, mapped = total + pss, mapped + files
            uid = int(re.findall(r"^Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.M)[0])
            label = names.get(uid) or ("supervisor" if pid == pids[0] else "spawner")
            rows.append(Row(label, pss / _MIB, "MiB PSS"))
        guest, other = _memory_files(pids)
    rows.sort(key=lambda row: row.value, reverse=True)
    summary = [
        Row("sum of PSS, guest memory not counted", total / _MIB, "MiB", _TARGET_MIB),
        Row("memory files beyond what is mapped", (other - mapped) / _MIB, "MiB"),
        Row("guest memory, not counted", guest / _MIB, "MiB"),
    ]
    return Result([*summary, *rows], details={"processes": len(pids)})
