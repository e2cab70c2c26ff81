"""The guest's first root: busybox, modules and an init that puts an overlay over the host's / and runs one command."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Mapping, Sequence

# Streams are virtio ports, because a serial console mangles bytes and mixes in kernel messages. A port can be opened
# only once, hence the FIFOs: the command may then open /dev/stderr again. The tmpfs prefers node 0, so that what tests
# write disturbs only one node.
INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod "/lib/$module.ko" || echo "lab: insmod $module failed"; done
. /job/settings

mkdir -p /lower /layer /root
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower || echo "lab: no host root"
mount -t tmpfs -o size=90%,mpol=prefer:0 layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /root
for d in proc sys dev; do mount --bind "/$d" "/root/$d"; done
mkdir -p /root/dev/pts /root/dev/shm /root/dev/hugepages /root/run
mount -t devpts devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t hugetlbfs huge /root/dev/hugepages
mount -t tmpfs run /root/run
mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
hostname lab
ifconfig lo 127.0.0.1 up

echo "$BALANCING" > /proc/sys/kernel/numa_balancing
echo 0 > /proc/sys/vm/watermark_boost_factor  # else how full a node may get changes for seconds after each huge page
echo madvise > /sys/kernel/mm/transparent_hugepage/enabled
for cpu in $OFFLINE; do echo 0 > "/sys/devices/system/cpu/cpu$cpu/online"; done
for node in $HUGE_NODES; do
  echo "$HUGE_2M" > "/sys/devices/system/node/node$node/hugepages/hugepages-2048kB/nr_hugepages"
done

for port in /sys/class/virtio-ports/vport*; do ln -s "/dev/${port##*/}" "/$(cat "$port/name")"; done
mkfifo /stdout.fifo /stderr.fifo
cat /stdout.fifo > /stdout & out=$!
cat /stderr.fifo > /stderr & err=$!
mkdir /root/run/lab
cp /job/command /root/run/lab/command
echo up > /status
chroot /root /bin/sh /run/lab/command > /stdout.fifo 2> /stderr.fifo < /dev/null
code=$?
# a background process of the command may hold its output open: give it 5 s
tries=0
while [ $tries -lt 50 ] && { kill -0 $out || kill -0 $err; } 2>/dev/null; do usleep 100000; tries=$((tries + 1)); done
echo "exit $code" > /status
sync
poweroff -f
"""


def archive(files: Mapping[str, bytes | None]) -> bytes:
    """A cpio archive ("newc") of files (mode 0755) and folders (None). Archives may be concatenated."""
    out = bytearray()
    entries: list[tuple[str, bytes | None]] = [*files.items(), ("TRAILER!!!", b"")]
    for inode, (name, data) in enumerate(entries, start=1):
        mode = (stat.S_IFDIR if data is None else stat.S_IFREG) | 0o755
        fields = [inode, mode, 0, 0, 1, 0, len(data or b""), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + (data or b"")
        out += b"\0" * (-len(out) % 4)
    return bytes(out) + b"\0" * (-len(out) % 512)


def base(busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> dict[str, bytes | None]:
    """What every boot needs."""
    files: dict[str, bytes | None] = dict.fromkeys(["bin", "proc", "sys", "dev", "lib", "job"])
    files["bin/busybox"] = busybox
    files |= {f"lib/{name}.ko": data for name, data in modules}
    files["modules"] = "\n".join(name for name, _ in modules).encode()
    return files


def job(
    command: Sequence[str], *, directory: str, environment: Mapping[str, str], settings: Mapping[str, object]
) -> dict[str, bytes | None]:
    """What this boot runs; `settings` become shell variables of the init."""
    lines = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    lines += ["ulimit -n 65536", f"cd {shlex.quote(directory)} || exit 125", f"exec {shlex.join(command)}"]
    assignments = [f"{key}={shlex.quote(str(value))}" for key, value in settings.items()]
    return {
        "init": INIT.encode(),
        "job": None,
        "job/command": "\n".join([*lines, ""]).encode(),
        "job/settings": "\n".join([*assignments, ""]).encode(),
    }
