"""Raw system calls, what they say in a sandbox, free memory and cgroup limits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from numagraft import native
from numagraft.native.system import _native

MIB = 1 << 20


def in_sandbox(refused: str, body: str) -> str:
    """Standard output of `body` in a process where the `refused` calls (an expression) end with EPERM."""
    prelude = f"""
import errno, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import seccomp
from numagraft import native
from numagraft.errors import PlacementError
from numagraft.native import PlacedBuffer, Runtime
from numagraft.runtime import RuntimeLayout, RuntimeNode
seccomp.refuse({refused}, errno.EPERM)
cpus = sorted(os.sched_getaffinity(0))
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(body)], capture_output=True, text=True, timeout=60
    )
    if "PR_SET_SECCOMP" in done.stderr:
        pytest.skip("this kernel takes no seccomp filter")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_call_works_or_names_its_errno() -> None:
    probe = native.binding_allowed()
    assert set(probe.refused.values()) <= set(errno.errorcode.values()) | {"misplaced"}
    native.set_fault("mbind", errno.EPERM)
    try:
        assert native.binding_allowed().mbind == "EPERM"
        assert native.binding_allowed().refused["mbind"] == "EPERM"
    finally:
        native.set_fault("mbind", None)
    assert native.binding_allowed() == probe


def test_a_sandbox_is_recognised() -> None:
    out = in_sandbox("seccomp.DOCKER", "print(sorted(native.binding_allowed().refused.items()))")
    assert eval(out) == [(call, "EPERM") for call in ("get_mempolicy", "mbind", "move_pages", "set_mempolicy")]


SANDBOXED = """
runtime = Runtime(RuntimeLayout(tuple(RuntimeNode(0, (cpu,), 1) for cpu in cpus)))
nodes = list(range(len(cpus)))
bound = runtime.allocate(8 << 20, [0], owner="bound")
spread = runtime.allocate(8 << 20, nodes, interleaved=True, owner="spread")
counts = runtime.verify([PlacedBuffer.of(bound), PlacedBuffer.of(spread)])
print([(c.per_node, c.absent, c.method, c.exact) for c in counts])
print([(a.obtained, a.refused) for a in runtime.memory_report()])
print(bound.node_at(0))
"""


def test_placement_in_a_sandbox_is_obtained_by_first_touch_and_verified() -> None:
    counts, arenas, node = in_sandbox("seccomp.DOCKER", SANDBOXED).splitlines()
    assert eval(counts) == [({0: 2048}, 0, "numa_maps", True)] * 2
    assert eval(arenas) == [("first_touch", "EPERM")] * 2
    assert node == "0"


def test_placement_where_only_mbind_is_refused() -> None:
    counts, arenas, _ = in_sandbox("('mbind',)", SANDBOXED).splitlines()
    assert eval(counts) == [({0: 2048}, 0, "move_pages", True)] * 2
    assert eval(arenas) == [("set_mempolicy", "EPERM")] * 2


def test_a_sandbox_that_refuses_pinning_is_an_error() -> None:
    body = """
    runtime = Runtime(RuntimeLayout((RuntimeNode(0, tuple(cpus), len(cpus)),)))
    try:
        runtime.allocate(1 << 20, [0], owner="w")
    except PlacementError as error:
        print(error)
    """
    assert "sched_setaffinity says EPERM" in in_sandbox("('sched_setaffinity',)", body)


locks_memory = pytest.mark.skipif(_native.sanitizer() != "", reason="sanitizers ignore mlockall")


@locks_memory
def test_locked_memory_limit() -> None:
    if os.geteuid() != 0:
        pytest.skip("changes the user, which needs root")
    body = """
    import ctypes, resource
    from numagraft.errors import PlacementError
    from numagraft.native import Runtime
    from numagraft.runtime import RuntimeLayout
    runtime = Runtime(RuntimeLayout.virtual(1))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
    import os; os.setuid(65534)
    assert ctypes.CDLL(None).mlockall(2) == 0  # MCL_FUTURE
    try:
        runtime.allocate(32 << 20, [0], owner="w")
    except PlacementError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "mmap says EAGAIN" in done.stdout
    assert "ulimit -l unlimited" in done.stdout


@locks_memory
def test_locking_everything_does_not_fill_the_reservation() -> None:
    if os.geteuid() != 0:
        pytest.skip("locking memory needs root here")
    body = """
    import ctypes, re
    from numagraft.native import Runtime
    from numagraft.runtime import RuntimeLayout
    runtime = Runtime(RuntimeLayout.virtual(1))
    runtime.observe_workers()
    assert ctypes.CDLL(None).mlockall(2) == 0
    rss = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = rss()
    runtime.allocate(1 << 20, [0], owner="w")
    print((rss() - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8


def test_address_space_limit() -> None:
    body = """
    import resource
    from numagraft.errors import PlacementError
    from numagraft.native import Runtime
    from numagraft.runtime import RuntimeLayout
    runtime = Runtime(RuntimeLayout.virtual(1))
    size = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20), size + (48 << 20)))
    print(runtime.allocate(16 << 20, [0], owner="fits").bytes)
    try:
        runtime.allocate(256 << 20, [0], owner="w")
    except PlacementError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{16 << 20}\n")
    assert "mmap says ENOMEM" in done.stdout
    assert "ulimit -v unlimited" in done.stdout


def test_faults_are_named_and_counted() -> None:
    with pytest.raises(ValueError, match="no system call named 'mind' here; known: mbind, set_mempolicy"):
        native.set_fault("mind", errno.EPERM)
    with pytest.raises(ValueError, match="not an errno"):
        native.set_fault("mbind", 99999)
    native.set_fault("move_pages", errno.EPERM, after=2)
    try:
        page = id(native) // 4096 * 4096
        assert [native.query_pages(page, 4096).method for _ in range(4)] == ["move_pages"] * 2 + ["numa_maps"] * 2
    finally:
        native.set_fault("move_pages", None)


ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_file 1000
      nr_active_file 3000
      nr_slab_reclaimable 500
  pages free     3840
        min      10
        low      40
        high     48
        protection: (0, 100, 200)
Node 0, zone   Normal
  pages free     10000
        low      60
        protection: (0, 0, 0)
Node 0, zone   Device
  pages free     5000
        low      0
        protection: (0, 0, 0)
Node 2, zone   Normal
  per-node stats
      nr_inactive_file 0
  pages free     20
        low      60
        protection: (0, 0, 0)
"""


def test_room_of_a_node_from_its_zones() -> None:
    zones = (3840 - 40 - 200) + (10_000 - 60)
    assert _native.parse_zoneinfo(ZONEINFO, 4096) == {0: (zones + (4000 - 100) + (500 - 100)) * 4096, 2: 0}


def test_room_of_this_machine_is_plausible() -> None:
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    available = native.available_by_node()
    assert 0 < sum(available.values()) <= total


def cgroup(root: Path, membership: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "file", "limit", "left"),
    [
        (
            "0::/user/app\n",
            {
                "user/memory.max": f"{1000 * MIB}\n",
                "user/memory.current": f"{900 * MIB}\n",
                "user/memory.stat": f"anon 5\ninactive_file {50 * MIB}\nactive_file {10 * MIB}\n",
                "user/app/memory.max": "max\n",
                "user/app/memory.current": "1\n",
            },
            "user/memory.max",
            1000 * MIB,
            160 * MIB,
        ),
        (
            "0::/host/path\n",  # a container shows its own folder as the top of the mount
            {"memory.max": f"{100 * MIB}\n", "memory.current": f"{40 * MIB}\n"},
            "memory.max",
            100 * MIB,
            60 * MIB,
        ),
        (
            "5:devices:/\n4:memory:/docker/1\n1:name=systemd:/\n0::/\n",
            {
                "memory/docker/1/memory.limit_in_bytes": f"{300 * MIB}\n",
                "memory/docker/1/memory.usage_in_bytes": f"{100 * MIB}\n",
                "memory/docker/1/memory.stat": f"inactive_file 7\ntotal_inactive_file {20 * MIB}\ntotal_active_file 0\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "5\n",
            },
            "memory/docker/1/memory.limit_in_bytes",
            300 * MIB,
            220 * MIB,
        ),
    ],
)
def test_tightest_cgroup_limit(
    tmp_path: Path, membership: str, files: dict[str, str], file: str, limit: int, left: int
) -> None:
    root = cgroup(tmp_path, membership, files)
    assert native.memory_cgroup_limit(str(root)) == (str(root / "sys/fs/cgroup" / file), limit, left)


@pytest.mark.parametrize("membership", ["", "0::/\n", "garbage\n::::\n", "0::/../..\n", "4:memory\n"])
def test_no_cgroup_limit(tmp_path: Path, membership: str) -> None:
    root = cgroup(tmp_path, membership, {"memory.max": "max\n", "memory.current": "5\n"})
    assert native.memory_cgroup_limit(str(root)) is None
    assert native.memory_cgroup_limit(str(tmp_path / "missing")) is None
