"""The lab's own arithmetic and refusals; nothing here boots a guest."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from . import __main__ as cli
from . import initramfs, kernel, machine
from .clock import counter_khz
from .topologies import TOPOLOGIES, Node, Topology, with_nodes


def read_archive(data: bytes) -> dict[str, tuple[int, bytes]]:
    """name -> (mode, contents), read as the kernel reads it."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701", f"no header at {at}"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        name = data[name_at : name_at + fields[11] - 1].decode()
        body = -(-(name_at + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[body : body + fields[6]])
        at = -(-(body + fields[6]) // 4) * 4


@pytest.mark.parametrize("contents", [b"", b"x", b"xyz", b"wxyz" * 999 + b"!"])
def test_archive_reads_back(contents):
    data = initramfs.archive({"folder": None, "folder/file": contents})
    assert len(data) % 512 == 0
    assert read_archive(data) == {"folder": (0o040755, b""), "folder/file": (0o100755, contents)}


def test_job_quotes_what_the_shell_would_read():
    command = ["echo", "a b", "$HOME;'"]
    job = initramfs.job(command, directory="/some where", environment={"K": "v $x"}, settings={"A": "1 2"})
    shown = subprocess.run(
        ["sh", "-c", job["job/command"].decode().replace("cd '/some where' || exit 125", 'printf "%s|" "$K"')],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "v $x|a b $HOME;'\n"
    assert job["job/settings"] == b"A='1 2'\n"


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=str)
def test_topologies_are_consistent(topology):
    online = topology.online
    assert topology.with_memory and topology.with_cpus
    assert sorted(cpu for node in online for cpu in topology.cpus_of(node)) == sorted(
        set(topology.all_cpus) - set(topology.offline)
    )
    for a in online:
        assert topology.distance(a, a) == 10
        assert all(topology.distance(a, b) > 10 for b in online if b != a)
    arguments = machine.command_line(topology, kernel=Path("k"), initrd=Path("i"), accelerator="tcg")
    assert sum(a.startswith("node,") for a in arguments) == len(topology.nodes)
    assert sum(a.startswith("memory-backend-ram") for a in arguments) == len(topology.with_memory)


def test_holes_are_nodes_whose_cpus_are_not_plugged():
    topology = TOPOLOGIES["sparse-ids"]
    assert topology.online == (0, 2, 5)
    assert topology.cpus_of(5) == (4, 5)
    arguments = machine.command_line(topology, kernel=Path("k"), initrd=Path("i"), accelerator="tcg")
    plugged = [a for a in arguments if "-x86_64-cpu," in a]
    assert len(plugged) == 4 and all("socket-id=2," in a or "socket-id=5," in a for a in plugged)
    assert arguments[arguments.index("-smp") + 1].startswith("2,maxcpus=12,")


def test_cpus_that_do_not_divide_are_refused():
    crooked = Topology("crooked", "", (Node(cpus=2), Node(cpus=1)), sockets=2)
    with pytest.raises(ValueError, match="crooked: 3 CPUs do not divide into 2 sockets"):
        machine.command_line(crooked, kernel=Path("k"), initrd=Path("i"), accelerator="tcg")


def test_nodes_chooses_the_plain_topology():
    assert [with_nodes(n).online for n in (1, 2, 4, 8)] == [tuple(range(n)) for n in (1, 2, 4, 8)]
    with pytest.raises(SystemExit, match="no topology of 3 nodes"):
        cli.main(["run", "--nodes", "3", "--", "true"])
    with pytest.raises(SystemExit, match="not both"):
        cli.main(["run", "--nodes", "2", "--topology", "smt", "--", "true"])


def test_without_a_kernel_the_run_is_skipped_with_its_reason(tmp_path, capsys):
    assert cli.main(["--cache", str(tmp_path), "run", "--nodes", "2"]) == cli.SKIPPED
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("lab: skipped: ")
    assert "python -m tests.lab setup" in json.loads(out.splitlines()[-1])["skipped"]


def test_without_apt_setup_is_skipped_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["--cache", str(tmp_path), "setup"]) == cli.SKIPPED
    assert capsys.readouterr().err.splitlines()[-1].startswith("lab: skipped: no apt-get")


def test_ci_says_what_it_skipped_or_where_it_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["--cache", str(tmp_path), "ci"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("lab: skipped: no apt-get")
    ran = []
    monkeypatch.setattr(cli, "setup", lambda cache: "ready")
    monkeypatch.setattr(cli, "_run", lambda topology, options: ran.append(topology.name) or int(ran[-1] == "4-nodes"))
    monkeypatch.setattr(cli, "SPARE_MIB", 0)
    assert cli.main(["--cache", str(tmp_path), "ci"]) == 1
    assert ran == ["2-nodes", "4-nodes", "memory-only-node"]
    assert capsys.readouterr().err.splitlines()[-1] == "lab: failed on 4-nodes (exit code 1)"
    monkeypatch.setattr(cli, "SPARE_MIB", 1 << 40)
    assert cli.main(["--cache", str(tmp_path), "ci"]) == 0
    assert "skipped: 2-nodes needs" in capsys.readouterr().err.splitlines()[-1]
    assert ran == ["2-nodes", "4-nodes", "memory-only-node"]


def emulator(script: str) -> list[str]:
    """A program that stands in for QEMU: writes to its console, then runs `script`, in which `say(port, text)` writes."""
    begin = """
def say(port, text):
    name = next(a for a in sys.argv if a.startswith("file,id=" + port + ","))
    with open(name.rsplit("path=")[1], "wb", buffering=0) as stream:
        stream.write(text.encode())
say("console", "last words")
"""
    return [sys.executable, "-c", f"import sys, time\n{begin}\n{script}"]


def test_an_emulator_that_dies_or_hangs_is_an_error_with_its_console():
    with pytest.raises(machine.GuestNotUp, match=r"(?s)ended before.*last words"):
        machine._supervise(emulator("sys.exit(0)"), timeout=30, output=lambda *_: None)
    with pytest.raises(machine.GuestNotUp, match=r"(?s)not come up after.*last words"):
        machine._supervise(emulator("time.sleep(60)"), timeout=1.5, output=lambda *_: None)
    with pytest.raises(machine.GuestTimeout, match=r"(?s)still running after 2 s, its time limit.*last words"):
        machine._supervise(emulator("say('status', 'up'); time.sleep(60)"), timeout=2, output=lambda *_: None)
    with pytest.raises(machine.GuestError, match=r"(?s)without running the command to its end.*last words"):
        machine._supervise(emulator("say('status', 'up')"), timeout=30, output=lambda *_: None)
    outcome = machine._supervise(emulator("say('status', 'up\\nexit 3\\n')"), timeout=30, output=lambda *_: None)
    assert outcome.exit_code == 3


@pytest.mark.parametrize(("failures", "code"), [(1, 0), (2, cli.BROKEN)])
def test_a_guest_that_does_not_come_up_is_booted_once_more(failures, code, capsys, monkeypatch):
    boots = []

    def boot(*_, **__) -> machine.Outcome:
        boots.append(1)
        if len(boots) <= failures:
            raise machine.GuestNotUp("the guest had not come up after 120 s")
        return machine.Outcome(exit_code=0, start_seconds=1, seconds=2)

    monkeypatch.setattr(machine, "run", boot)
    assert cli.main(["run", "--nodes", "2", "--", "true"]) == code
    assert len(boots) == 2 and "once more" in capsys.readouterr().err


def test_a_hung_command_is_not_run_again(capsys, monkeypatch):
    boots = []

    def boot(*_, **__) -> machine.Outcome:
        boots.append(1)
        raise machine.GuestTimeout("the command was still running after 360 s, its time limit")

    monkeypatch.setattr(machine, "run", boot)
    assert cli.main(["run", "--nodes", "2", "--", "true"]) == cli.TIMEOUT
    assert len(boots) == 1 and "its time limit" in capsys.readouterr().err


def test_modules_come_after_what_they_need(tmp_path):
    folder = tmp_path / "lib/modules/6/kernel"
    folder.mkdir(parents=True)
    for name, depends in (("9p", "9pnet,netfs"), ("9pnet", ""), ("netfs", "fs-cache"), ("fs-cache", ""), ("other", "")):
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + depends.encode() + b"\0name=x\0")
    order = [name for name, _ in kernel._modules(tmp_path)]
    assert set(order) == {"9p", "9pnet", "netfs", "fs_cache"}
    assert order.index("fs_cache") < order.index("netfs") < order.index("9p") > order.index("9pnet")


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("=== 3 passed, 1 failed in 2.13s ===", {"passed": 3, "failed": 1}),
        ("1 skipped in 0.02s", {"skipped": 1}),
        ("nothing of the kind", {}),
    ],
)
def test_counts_are_read_from_the_last_line(line, counts):
    assert cli._counts(f"5 passed\n{line}\n") == counts


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lab runs on x86-64 only")
def test_the_counters_rate_is_measured():
    khz = counter_khz()
    assert khz is not None and 500_000 < khz < 10_000_000
    assert abs(counter_khz() - khz) < 0.02 * khz
