"""Garbage, missing and hostile files never stop detection, and never produce a platform that contradicts itself."""

from __future__ import annotations

import io
import os
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numagraft.doctor import Circumstances, diagnose
from numagraft.errors import PlatformError
from numagraft.platform import Platform
from numagraft.platform.tree import FolderTree, MemoryTree, open_dump
from numagraft.runtime import RuntimeLayout
from tests.topologies import machines
from tests.topologies.machines import MACHINES

SMALL = {
    name: machines.files(MACHINES[name])
    for name in ("one-node", "dual-xeon-cxl", "dual-xeon-cgroup-v2", "dual-xeon-cgroup-v1")
}
NASTY = [
    "",
    "\n",
    "-1",
    "0-99999999999999999999",
    "0-600",
    "5-3",
    "0,,,1",
    "0-",
    "-",
    "٣",
    "0x10",
    "1e9",
    "NaN",
    "99999999999999999999999999",
    "\0" * 100,
    "ffffffff," * 3000,
    "f" * 5000,
    ",".join(["ffffffff"] * 2048),
    "Node 0 MemTotal: -5 kB",
    "Node 0 MemTotal: 18446744073709551615 kB\nMemFree: 5",
    "MemTotal",
    ":" * 50,
    "10 20",
    "10 " * 5000,
    "256",
    "0::/../../../etc",
    "5:memory:relative",
    "1 2 3:4 /a /b - cgroup2 x y",
    "[always] [madvise]",
    "interleave:9-1",
    "7f00 bind:99999999 file=/x",
]
contents = st.one_of(st.sampled_from(NASTY), st.text(max_size=60), st.binary(max_size=60))


def check(platform: Platform) -> None:
    assert platform.nodes
    assert platform.allowed_cpus and platform.allowed_nodes
    ids = {node.id for node in platform.nodes}
    online = {cpu.id for cpu in platform.cpus if cpu.online}
    assert set(platform.allowed_cpus) <= online
    assert set(platform.allowed_nodes) <= ids
    assert len(ids) == len(platform.nodes) and len({cpu.id for cpu in platform.cpus}) == len(platform.cpus)
    for node in platform.nodes:
        assert set(node.cpus) <= online
        assert 0 <= node.free_bytes <= node.total_bytes
        assert 0 <= node.available_bytes <= node.total_bytes
        assert set(node.distances) <= ids
    assert Platform.from_json(platform.to_json()) == platform
    layout = RuntimeLayout.from_platform(platform)
    assert layout.compute_nodes and not layout.bound
    assert set(cpu for node in layout.nodes for cpu in node.cpus) <= set(platform.allowed_cpus)
    diagnose(Circumstances(platform))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SMALL)))
def test_files_replaced_by_garbage_or_missing(data, name):
    files: dict[str, str | bytes] = dict(SMALL[name])
    paths = sorted(files)
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=12, unique=True)):
        files[path] = data.draw(contents)
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=12, unique=True)):
        files.pop(path, None)
    check(Platform.read(MemoryTree(files)))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "/proc/cpuinfo",
                "/proc/meminfo",
                "/proc/self/status",
                "/proc/self/limits",
                "/proc/self/cgroup",
                "/proc/self/mountinfo",
                "/proc/self/numa_maps",
                "/sys/devices/system/node/online",
                "/sys/devices/system/node/node0/cpulist",
                "/sys/devices/system/node/node99999/cpulist",
                "/sys/devices/system/node/node7/meminfo",
                "/sys/devices/system/cpu/online",
                "/sys/devices/system/cpu/present",
                "/sys/devices/system/cpu/cpu3/topology/thread_siblings",
                "/sys/devices/system/cpu/cpu0/online",
                "/sys/bus/pci/devices/0000:00:00.0/class",
                "/sys/bus/pci/devices/0000:00:00.0/resource",
                "/sys/firmware/dmi/entries/17-0/raw",
                "/sys/devices/system/edac/mc/mc0/dimm0/size",
            ]
        ),
        contents,
    )
)
def test_a_few_files_of_nonsense(files):
    check(Platform.read(MemoryTree(files)))


@pytest.mark.timeout(60)  # it was quadratic: minutes
def test_one_core_that_claims_every_cpu():
    mask = ",".join(["ffffffff"] * 2048)
    platform = Platform.read(
        MemoryTree({"/sys/devices/system/cpu/online": "0-3", "/sys/devices/system/cpu/cpu3/topology/thread_siblings": mask})
    )
    check(platform)


def test_the_largest_number_of_cpus_that_is_believed():
    files = {"/sys/devices/system/cpu/online": "0-65535", "/sys/devices/system/node/node0/cpulist": "0-65535"}
    platform = Platform.read(MemoryTree(files))
    assert len(platform.allowed_cpus) == 65536
    files["/sys/devices/system/cpu/online"] = "0-65536"
    assert Platform.read(MemoryTree(files)).allowed_cpus == tuple(range(65536))  # from the node


def test_nothing_at_all():
    platform = Platform.read(MemoryTree({}))
    check(platform)
    assert platform.allowed_cpus == (0,)
    assert "no CPU is described: one is assumed" in platform.notes
    assert "the kernel tells of no NUMA nodes: one node is assumed to hold all CPUs" in platform.notes


def test_a_kernel_without_numa_is_one_node():
    files = {path: text for path, text in SMALL["one-node"].items() if "/node/" not in path}
    platform = Platform.read(MemoryTree(files))
    assert [(node.id, node.cpus, node.total_bytes >> 30) for node in platform.nodes] == [(0, tuple(range(16)), 64)]
    assert {cpu.node for cpu in platform.cpus} == {0}
    assert len(platform.cores()) == 8


def test_only_cpuinfo():
    """A sandbox without sysfs: sockets and cores from /proc/cpuinfo."""
    blocks = [
        f"processor : {i}\nphysical id : {i % 2}\ncore id : {i // 2 % 2}\nflags : avx2 fma f16c\n" for i in range(8)
    ]
    platform = Platform.read(MemoryTree({"/proc/cpuinfo": "\n".join(blocks), "/proc/meminfo": "MemTotal: 1024 kB"}))
    assert platform.cores() == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert platform.sockets == (0, 1)
    assert platform.isa == ("avx2", "scalar")


def test_mems_allowed_that_name_nothing_are_noted():
    files = {**SMALL["one-node"], "/proc/self/status": "Mems_allowed_list: 5\nCpus_allowed_list: 900\n"}
    platform = Platform.read(MemoryTree(files))
    check(platform)
    assert len(platform.notes) == 2 and "none of the memory nodes 0 is allowed (5)" in platform.notes[1]


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "link out of the dump", "folder", "link to itself"])
def test_files_of_other_kinds_are_not_read(kind, tmp_path):
    root = tmp_path / "dump"
    online = machines.write("one-node", root) / "sys/devices/system/cpu/online"
    online.unlink()
    secret = tmp_path / "secret"
    secret.write_text("0-1")
    if kind == "fifo":
        os.mkfifo(online)
    elif kind == "folder":
        online.mkdir()
    else:
        online.symlink_to(
            {"link to a device": "/dev/zero", "link out of the dump": secret, "link to itself": "online"}[kind]
        )
    started = time.monotonic()
    assert FolderTree(root).read("/sys/devices/system/cpu/online") is None
    platform = Platform.detect(root)
    assert time.monotonic() - started < 10
    assert len(platform.allowed_cpus) == 16  # from the folders


def test_a_link_inside_the_dump_is_followed(tmp_path):
    root = machines.write("one-node", tmp_path)
    online = root / "sys/devices/system/cpu/online"
    online.rename(online.with_name("elsewhere"))
    online.symlink_to("elsewhere")
    assert FolderTree(root).read("/sys/devices/system/cpu/online") == "0-15"


def test_links_in_archives():
    files = {"/sys/real/a": "1", "/sys/other": "x"}
    links = {"/sys/link": "real", "/sys/abs": "/sys/real", "/sys/loop": "loop", "/sys/out": "../../../../etc"}
    tree = MemoryTree(files, links=links)
    assert tree.read("/sys/link/a") == "1"
    assert tree.read("/sys/abs/a") == "1"
    assert tree.read("/sys/loop/a") is None
    assert tree.read("/sys/out/passwd") is None
    assert tree.entries("/sys/link") == ("a",)


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"readme": b"x"}, "neither sys/ nor node/ and cpu/ in it"),
        ({f"sys/{i}": bytes(1 << 18) for i in range(5)}, "more than 1 MiB unpacked"),
        ({f"sys/{i}": b"" for i in range(101)}, "more than 100 members"),
    ],
    ids=["no dump", "a bomb", "many files"],
)
def test_archives_that_are_none(members, message, tmp_path, monkeypatch):
    monkeypatch.setattr("numagraft.platform.tree.ARCHIVE_TOTAL_LIMIT", 1 << 20)
    monkeypatch.setattr("numagraft.platform.tree.ARCHIVE_MEMBER_LIMIT", 100)
    with pytest.raises(PlatformError, match=message):
        Platform.from_dump(archive(tmp_path / "x.tar.gz", members))


def test_names_in_archives_cannot_leave_it(tmp_path):
    path = archive(tmp_path / "x.tar.gz", {"m/sys/devices/system/node/online": b"0", "m/sys/../../../../etc/x": b"1"})
    tree = open_dump(path)
    assert tree.read("/sys/devices/system/node/online") == "0"
    assert tree.entries("/") == ("sys",)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08broken"])
def test_files_that_are_no_archives(content, tmp_path):
    path = tmp_path / "x.tar.bz2"
    path.write_bytes(content)
    with pytest.raises(PlatformError, match=r"cannot read the dump"):
        Platform.from_dump(path)


def test_places_that_are_no_dumps(tmp_path):
    with pytest.raises(PlatformError, match="there is no such file or folder"):
        Platform.from_dump(tmp_path / "missing")
    with pytest.raises(PlatformError, match="no sys/ in it"):
        Platform.detect(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "sys").mkdir(parents=True)
    with pytest.raises(PlatformError, match="2 folders with sys/"):
        Platform.detect(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "expected 1, found 'list'"),
        ('{"schema": 99}', "expected 1, found 99"),
        ('{"schema": 1}', "nodes: is missing"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_that_is_no_platform(text, message):
    with pytest.raises(PlatformError) as caught:
        Platform.from_json(text)
    assert message in str(caught.value)


def test_json_errors_come_all_at_once():
    text = machines.platform("one-node").to_json()
    broken = text.replace('"total_bytes": ', '"total_bytes": "x", "colour": ').replace(
        '"source": "one-node"', '"source": 5'
    )
    with pytest.raises(PlatformError) as caught:
        Platform.from_json(broken)
    assert {problem.where for problem in caught.value.problems} == {"source", "nodes[0].total_bytes", "nodes[0].colour"}
    with pytest.raises(PlatformError, match="77 do not exist"):
        Platform.from_json(text.replace('"allowed_nodes": [0]', '"allowed_nodes": [77]'))


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda s: st.lists(s) | st.dictionaries(st.text(max_size=5), s),
        max_leaves=10,
    ),
    st.sampled_from(["nodes", "cpus", "cpu", "cgroup", "allowed_cpus", "policy", "gpus"]),
)
def test_json_with_a_field_of_garbage(value, field):
    import json

    data = json.loads(machines.platform("one-node").to_json())
    data[field] = value
    try:
        check(Platform.from_json(json.dumps(data)))
    except PlatformError as error:
        assert error.problems
