"""Boots one guest, runs one command in it, and brings back its output and its exit code."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import initramfs
from .clock import counter_khz
from .kernel import QEMU, Cache
from .topologies import Topology

BOOT_SECONDS = 120.0  # a guest that is not up by then has crashed before it could say so
STREAMS = ("stdout", "stderr", "status", "console")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 nowatchdog tsc=nowatchdog "
    "rcupdate.rcu_expedited=1 rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on"
)
# la57 costs page-table levels; the vendor must be one whose CPUs QEMU can give SMT
CPU = {"tcg": "max,la57=off,vendor=GenuineIntel", "kvm": "host"}
ACCELERATOR = {"tcg": "tcg,thread=multi", "kvm": "kvm"}


class GuestError(Exception):
    """The guest did not run the command to its end; the message ends with what its console said."""


class GuestTimeout(GuestError):
    """The command was still running when its time was up."""


class GuestNotUp(GuestError):
    """The command was never started."""


@dataclass
class Outcome:
    """`exit_code` is the command's; times are wall-clock seconds from the launch of the emulator."""

    exit_code: int
    start_seconds: float
    seconds: float
    console: str = field(repr=False, default="")


def run(
    topology: Topology,
    command: Sequence[str],
    *,
    cache: Cache,
    environment: Mapping[str, str],
    directory: str | None = None,
    accelerator: str = "tcg",
    timeout: float = 600.0,
    kernel_arguments: str = "",
    output: Callable[[str, bytes], None] | None = None,
) -> Outcome:
    """Runs `command` in `directory` (default: here) of a guest that sees the host's files; what it writes is lost.

    `output(stream, chunk)` gets what it prints ("stdout", "stderr"); the default passes it on. Raises Unavailable,
    GuestNotUp, GuestTimeout, GuestError.
    """
    cache.require()
    output = output or (lambda stream, chunk: _write_all(1 if stream == "stdout" else 2, chunk))
    job = initramfs.job(
        command,
        directory=directory or os.getcwd(),
        environment=environment,
        settings={
            "BALANCING": int(topology.numa_balancing),
            "OFFLINE": " ".join(map(str, topology.offline)),
            "HUGE_NODES": " ".join(map(str, topology.with_memory)),
            "HUGE_2M": topology.huge_2m,
        },
    )
    with tempfile.TemporaryDirectory(prefix="numagraft-lab.") as scratch:
        initrd = Path(scratch, "initrd")
        initrd.write_bytes(cache.base.read_bytes() + initramfs.archive(job))
        arguments = command_line(topology, kernel=cache.kernel, initrd=initrd, accelerator=accelerator)
        khz = counter_khz() if accelerator == "tcg" else None
        clock = f" tsc_early_khz={khz}" if khz else ""
        arguments[arguments.index("-append") + 1] += f"{clock} {topology.kernel_arguments} {kernel_arguments}"
        return _supervise(arguments, timeout=timeout, output=output)


def command_line(topology: Topology, *, kernel: Path, initrd: Path, accelerator: str) -> list[str]:
    """QEMU's arguments, without the character devices (they name open files)."""
    nodes = topology.nodes
    possible = sum(node.cpus for node in nodes)
    present = [(i, node) for i, node in enumerate(nodes) if node.present]
    cores = possible // topology.sockets // topology.threads_per_core
    if cores * topology.sockets * topology.threads_per_core != possible:
        raise ValueError(f"{topology.name}: {possible} CPUs do not divide into {topology.sockets} sockets")
    holes = len(present) < len(nodes)
    smp = f"{nodes[0].cpus if holes else possible},maxcpus={possible}"
    arguments = [
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", ACCELERATOR[accelerator], "-cpu", CPU[accelerator], "-machine", "pc",
        "-m", f"{sum(node.mib for _, node in present)}M",
        "-smp", f"{smp},sockets={topology.sockets},cores={cores},threads={topology.threads_per_core}",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", KERNEL_ARGUMENTS,
        "-fsdev", "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
    ]  # fmt: skip
    first = 0
    for i, node in enumerate(nodes):
        option = f"node,nodeid={i}"
        if node.mib:
            arguments += ["-object", f"memory-backend-ram,id=m{i},size={node.mib}M"]
            option += f",memdev=m{i}"
        if node.cpus:
            option += f",cpus={first}-{first + node.cpus - 1}"
        arguments += ["-numa", option]
        if holes and node.present and i:  # plugged one by one: a hole is a node whose CPUs could be plugged but are not
            for cpu in range(first, first + node.cpus):
                core, thread = divmod(cpu, topology.threads_per_core)
                socket, core = divmod(core, cores)
                arguments += [
                    "-device",
                    f"{CPU[accelerator].split(',')[0]}-x86_64-cpu,socket-id={socket},core-id={core},thread-id={thread}",
                ]
        first += node.cpus
    for a, node_a in enumerate(nodes):
        for b, node_b in enumerate(nodes):
            if a != b:
                value = topology.distance(a, b) if node_a.present and node_b.present else 20
                arguments += ["-numa", f"dist,src={a},dst={b},val={value}"]
    return arguments


def _supervise(arguments: list[str], *, timeout: float, output: Callable[[str, bytes], None]) -> Outcome:
    begin = time.monotonic()
    pipes = {name: os.pipe() for name in STREAMS}
    devices = ["-device", "virtio-serial-pci"]
    for name, (_, end) in pipes.items():
        devices += ["-chardev", f"file,id={name},path=/dev/fd/{end}"]
        port = ["-device", f"virtserialport,chardev={name},name={name}"]
        devices += ["-serial", f"chardev:{name}"] if name == "console" else port
    collected = {"status": bytearray(), "console": bytearray()}
    up: list[float] = []

    def pump(name: str, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            while chunk := stream.read(65536):
                if name not in collected:
                    output(name, chunk)
                    continue
                collected[name].extend(chunk)
                if name == "status" and not up:
                    up.append(time.monotonic() - begin)

    with _emulator(arguments + devices, [end for _, end in pipes.values()]) as process:
        for _, end in pipes.values():
            os.close(end)
        pumps = [threading.Thread(target=pump, args=(name, reader), daemon=True) for name, (reader, _) in pipes.items()]
        for thread in pumps:
            thread.start()
        while process.poll() is None:
            seconds = time.monotonic() - begin
            if not up and seconds > min(timeout, BOOT_SECONDS):
                raise GuestNotUp(f"the guest had not come up after {seconds:.0f} s\n{_tail(collected['console'])}")
            if seconds > timeout:
                raise GuestTimeout(
                    f"the command was still running after {seconds:.0f} s, its time limit\n{_tail(collected['console'])}"
                )
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        for thread in pumps:
            thread.join(5)
    code = re.search(rb"^exit (\d+)", collected["status"], re.MULTILINE)
    if not up:
        raise GuestNotUp(f"the emulator ended before the guest had come up\n{_tail(collected['console'])}")
    if code is None:
        raise GuestError(f"the guest ended without running the command to its end\n{_tail(collected['console'])}")
    return Outcome(
        exit_code=int(code.group(1)),
        start_seconds=up[0],
        seconds=time.monotonic() - begin,
        console=collected["console"].decode(errors="replace"),
    )


@contextmanager
def _emulator(arguments: list[str], descriptors: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU, gone when the block ends however it ends, and when this process is killed."""
    libc = ctypes.CDLL(None)
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _tail(console: bytearray) -> str:
    return "its console ended with:\n" + console.decode(errors="replace")[-3000:]


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
