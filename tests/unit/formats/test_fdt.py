# SPDX-License-Identifier: MIT OR Apache-2.0
"""Flattened device trees: QEMU's own, ours, and every way to damage one."""

from __future__ import annotations

import base64
import struct
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.fdt import MAX_DEPTH, MAX_NODES, DeviceTree, Header, Node, Reservation, cells, strings

# The tree of QEMU 7.2.22's microvm (ioapic2=off, three isa-serial ports, one virtio-blk-device), as its fw_cfg file
# etc/fdt gives it to firmware; zlib, base 85. The 1 MiB file is zeros behind these bytes.
_QEMU_MICROVM = (
    "c-oy(!Ab)$5FNK3Dr%`92wn@GT1>4K!An2DgGX<YW~Xi-n=DCM#FGc_et<vWC-?~-{0J}JJr$E~wxq>Mb>NYC$>hBmn77^OCp5vw0HC(-PU5iVP~H"
    "MO10?UTIyS;tbJ%n^bVwq;9r1=Q6kLw)+Bs)hP4b{&P;)8<z0vtxtM2d^G-7=N@KABz<7IgM3U&49KS<L(>-YUgvmPp+lOKF)>-i*q@#*3J=lNL2X"
    "Tr7R>L$;*8jNsA2oe(MSDpvIc={ME`%hmQ;VG%=c6?I$wY}fG2d-$rS=ae9;$z9{I`Z=T>Zf_9uhlv=Va4uvei3mWM<Mrn3tU<hZHA{^LONwr^B!5I"
    "3`&S+c{*NPx+GwWsl1?;4+TPtrm03_It+y{&@%iUL+;(Q9v8O5l(bq2ff`!T?W{`UEfg7*sS_*rzG7)k-Omg)N*jq4bn(J~v8fvS2b+BZmJ)<#"
)


def qemu_microvm() -> bytes:
    """QEMU's blob, whole."""
    return zlib.decompress(base64.b85decode(_QEMU_MICROVM)).ljust(1 << 20, b"\0")


_SMALL = DeviceTree(
    Node(
        "",
        (("#address-cells", cells(2)), ("model", strings("small")), ("empty", b"")),
        (
            Node("bus", (), (Node("dev@1", (("reg", cells(0, 1)), ("model", strings("a", "b")))), Node("dev@2"))),
            Node("chosen", (("odd", b"\x01\x02\x03"),)),
        ),
    ),
    (Reservation(0x1000, 0x2000),),
    boot_cpu=3,
)


def test_qemus_tree() -> None:
    tree = DeviceTree.parse(qemu_microvm())
    nodes = {path: node for path, node, _ in tree.walk()}
    disk = nodes["/virtio_mmio@feb00e00"]
    assert disk.strings("compatible") == ("virtio,mmio",)
    assert disk.tuples("reg", tree.root.cell("#address-cells", 2), tree.root.cell("#size-cells", 1)) == (
        (0xFEB0_0E00, 0x200),
    )
    assert [path for path in nodes if "serial" in path] == ["/serial@3f8", "/serial@2f8", "/serial@3e8"]
    assert nodes["/chosen"].strings("stdout-path") == ("/serial@3f8",)
    assert DeviceTree.parse(tree.pack()) == tree
    assert len(tree.pack()) < 1000


def test_round_trip_and_readings() -> None:
    blob = _SMALL.pack()
    assert DeviceTree.parse(blob) == _SMALL
    assert DeviceTree.parse(blob + b"behind it") == _SMALL
    device = _SMALL.root.children[0].children[0]
    assert device.strings("model") == ("a", "b")
    assert device.tuples("reg", 1, 1) == ((0, 1),)
    assert device.tuples("reg", 2) == ((1,),)
    assert device.strings("none") == ()
    assert device.get("none") is None
    assert device.cell("none", 7) == 7
    assert [(path, parent.name if parent else None) for path, _, parent in _SMALL.walk()] == [
        ("/", None),
        ("/bus", ""),
        ("/bus/dev@1", "bus"),
        ("/bus/dev@2", "bus"),
        ("/chosen", ""),
    ]


@pytest.mark.parametrize(
    "read",
    [
        lambda node: node.cell("model", 0),
        lambda node: node.tuples("odd", 1),
        lambda node: node.tuples("odd", 5),
        lambda node: node.tuples("odd", 0),
        lambda node: node.tuples("odd"),
        lambda node: node.strings("odd"),
        lambda node: node.strings("raw"),
        lambda node: cells(-1),
        lambda node: cells(1 << 32),
        lambda node: strings("\n"),
        lambda node: strings("é"),
    ],
)
def test_a_value_of_another_form(read: object) -> None:
    node = Node("n", (("model", strings("a")), ("odd", b"abc"), ("raw", b"\xff\0")))
    with pytest.raises(FormatError) as caught:
        read(node)  # type: ignore[operator]
    assert caught.value.code == "fdt-value"


def _edit(**changes: int) -> bytes:
    blob = _SMALL.pack()
    return Header.parse_at(blob, 0).replace(**changes).pack() + blob[Header.SIZE :]


_HEADER = Header.parse_at(_SMALL.pack(), 0)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"magic": 0xEDFE0DD0}, "fdt-header"),
        ({"version": 16}, "fdt-header"),
        ({"last_compatible_version": 18}, "fdt-header"),
        ({"last_compatible_version": 3}, "fdt-header"),
        ({"total_bytes": 39}, "fdt-header"),
        ({"total_bytes": _HEADER.total_bytes + 1}, "fdt-header"),
        ({"total_bytes": _HEADER.total_bytes - 1}, "fdt-blocks"),
        ({"structure_offset": _HEADER.structure_offset + 2}, "fdt-blocks"),
        ({"structure_offset": _HEADER.strings_offset}, "fdt-blocks"),
        ({"structure_offset": 8}, "fdt-blocks"),
        ({"structure_offset": 0xFFFF_FFFC}, "fdt-blocks"),
        ({"strings_offset": 0}, "fdt-blocks"),
        ({"strings_offset": _HEADER.strings_offset - 1}, "fdt-blocks"),
        ({"strings_bytes": 0xFFFF_FFFF}, "fdt-blocks"),
        ({"structure_bytes": 0xFFFF_FFFF}, "fdt-blocks"),
        ({"structure_bytes": _HEADER.structure_bytes - 4}, "cursor-truncated"),
        ({"structure_bytes": 0}, "cursor-truncated"),
        ({"strings_bytes": 3}, "fdt-name"),
        ({"reservations_offset": 36}, "fdt-blocks"),
        ({"reservations_offset": _HEADER.total_bytes}, "record-truncated"),
    ],
)
def test_a_wrong_header(changes: dict[str, int], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        DeviceTree.parse(_edit(**changes))
    assert caught.value.code == code


def _blob(structure: bytes, names: bytes = b"name\0", reserved: bytes = bytes(16)) -> bytes:
    start = Header.SIZE + len(reserved)
    end = start + len(structure)
    header = Header(0xD00DFEED, end + len(names), start, end, Header.SIZE, 17, 16, 0, len(names), len(structure))
    return header.pack() + reserved + structure + names


_BEGIN, _END_NODE, _PROP, _NOP, _END = (struct.pack(">I", token) for token in (1, 2, 3, 4, 9))
_ROOT = _BEGIN + bytes(4)
_VALUE = _PROP + struct.pack(">II", 2, 0) + b"ab\xff\xff"  # what aligns a value is nobody's


def test_what_the_builder_of_broken_trees_builds_right() -> None:
    tree = DeviceTree.parse(
        _blob(_NOP + _ROOT + _VALUE + _NOP + _BEGIN + b"a@1\0" + _END_NODE + _END_NODE + _NOP + _END)
    )
    assert tree == DeviceTree(Node("", (("name", b"ab"),), (Node("a@1"),)))


@pytest.mark.parametrize(
    ("structure", "code"),
    [
        (_END, "fdt-structure"),
        (_END_NODE + _END, "fdt-structure"),
        (_VALUE + _END, "fdt-structure"),
        (_ROOT + _END, "fdt-structure"),
        (_ROOT + _END_NODE + _ROOT + _END_NODE + _END, "fdt-structure"),
        (_ROOT + _END_NODE + _VALUE + _END, "fdt-structure"),
        (_ROOT + _END_NODE + _END + _NOP, "cursor-trailing"),
        (_ROOT + _END_NODE, "cursor-truncated"),
        (_ROOT + _VALUE + _VALUE + _END_NODE + _END, "fdt-structure"),
        (_ROOT + _BEGIN + b"a\0\0\0" + _END_NODE + _VALUE + _END_NODE + _END, "fdt-structure"),
        (_ROOT + (_BEGIN + b"a\0\0\0" + _END_NODE) * 2 + _END_NODE + _END, "fdt-structure"),
        (_BEGIN + b"a\0\0\0" + _END_NODE + _END, "fdt-structure"),
        (_ROOT + struct.pack(">I", 5) + _END_NODE + _END, "fdt-structure"),
        (_ROOT + _BEGIN + b"\0\0\0\0" + _END_NODE + _END_NODE + _END, "fdt-name"),
        (_ROOT + _BEGIN + b"a/b\0" + _END_NODE + _END_NODE + _END, "fdt-name"),
        (_ROOT + _BEGIN + b"a@\0\0" + _END_NODE + _END_NODE + _END, "fdt-name"),
        (_ROOT + _BEGIN + b"a" * 36 + b"\0\0\0\0" + _END_NODE + _END_NODE + _END, "fdt-name"),
        (_ROOT + _BEGIN + b"a" * 64, "fdt-name"),
        (_ROOT + _PROP + struct.pack(">II", 0, 5) + _END_NODE + _END, "fdt-name"),
        (_ROOT + _PROP + struct.pack(">II", 0, 4) + _END_NODE + _END, "fdt-name"),
        (_ROOT + _PROP + struct.pack(">II", 0xFFFF_FFFF, 0) + _END_NODE + _END, "cursor-truncated"),
        (_ROOT + (_BEGIN + b"a\0\0\0") * MAX_DEPTH, "fdt-limit"),
    ],
)
def test_a_wrong_structure(structure: bytes, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        DeviceTree.parse(_blob(structure))
    assert caught.value.code == code


def test_too_many_nodes_and_reservations() -> None:
    nodes = b"".join(_BEGIN + b"%07x\0" % index + _END_NODE for index in range(MAX_NODES))
    for blob in (
        _blob(_ROOT + nodes + _END_NODE + _END),
        _blob(_ROOT + _END_NODE + _END, reserved=struct.pack(">QQ", 1, 1) * 65 + bytes(16)),
    ):
        with pytest.raises(FormatError) as caught:
            DeviceTree.parse(blob)
        assert caught.value.code == "fdt-limit"
    with pytest.raises(FormatError) as caught:
        DeviceTree.parse(_blob(_ROOT + _END_NODE + _END, reserved=struct.pack(">QQ", 1, 0) + bytes(16)))
    assert caught.value.code == "fdt-blocks"


def test_a_mebibyte_of_nothing_is_read_in_bounded_time() -> None:
    start = time.process_time()
    DeviceTree.parse(_blob(_ROOT + _NOP * ((1 << 18) - 64) + _END_NODE + _END))
    assert time.process_time() - start < 5


def _chain(depth: int) -> Node:
    node = Node("n")
    for _ in range(depth - 2):
        node = Node("n", (), (node,))
    return Node("", (), (node,))


@pytest.mark.parametrize(
    ("tree", "code"),
    [
        (DeviceTree(Node("root")), "fdt-name"),
        (DeviceTree(Node("", (), (Node(""),))), "fdt-name"),
        (DeviceTree(Node("", (), (Node("é"),))), "fdt-name"),
        (DeviceTree(Node("", (("a b", b""),))), "fdt-name"),
        (DeviceTree(Node("", (("a", b""), ("a", b"")))), "fdt-structure"),
        (DeviceTree(Node("", (), (Node("a"), Node("a")))), "fdt-structure"),
        (DeviceTree(_chain(MAX_DEPTH + 1)), "fdt-limit"),
        (DeviceTree(Node("", (), tuple(Node(f"n{index}") for index in range(MAX_NODES)))), "fdt-limit"),
        (DeviceTree(Node("", (("a", bytes(1 << 20)),))), "fdt-limit"),
        (DeviceTree(Node(""), (Reservation(1, 0),)), "fdt-limit"),
        (DeviceTree(Node(""), (Reservation(1, 1),) * 65), "fdt-limit"),
        (DeviceTree(Node(""), boot_cpu=1 << 32), "record-width"),
    ],
)
def test_what_is_not_written(tree: DeviceTree, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        tree.pack()
    assert caught.value.code == code
    assert DeviceTree.parse(DeviceTree(_chain(MAX_DEPTH)).pack()).root == _chain(MAX_DEPTH)


def test_every_truncation_and_every_flipped_bit() -> None:
    blob = _SMALL.pack()
    for length in range(len(blob)):
        with pytest.raises(SvsmError):
            DeviceTree.parse(blob[:length])
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            tree = DeviceTree.parse(damaged)
        except SvsmError:
            continue
        assert DeviceTree.parse(tree.pack()) == tree


_NAMES = st.from_regex(r"\A[a-z,._+-]{1,31}\Z")
_PROPERTIES = st.dictionaries(_NAMES, st.binary(max_size=20), max_size=3).map(lambda found: tuple(found.items()))


def _nodes(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    some = st.lists(children, max_size=3, unique_by=lambda node: node.name).map(tuple)
    return st.builds(Node, _NAMES, _PROPERTIES, some)


_TREES = st.builds(
    lambda node, reserved, cpu: DeviceTree(Node("", node.properties, node.children), tuple(reserved), cpu),
    st.recursive(st.builds(Node, _NAMES, _PROPERTIES), _nodes, max_leaves=6),
    st.lists(st.builds(Reservation, st.integers(0, (1 << 64) - 1), st.integers(1, (1 << 64) - 1)), max_size=2),
    st.integers(0, (1 << 32) - 1),
)


@given(_TREES)
def test_any_tree(tree: DeviceTree) -> None:
    assert DeviceTree.parse(tree.pack()) == tree


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_any_bytes(structure: bytes, names: bytes) -> None:
    for blob in (structure, _blob(structure, names), _blob(_ROOT + structure + _END_NODE + _END, names)):
        try:
            DeviceTree.parse(blob)
        except SvsmError:
            continue
