"""What the lab boots: Debian's stock kernel and a static busybox, unpacked into a cache, never installed."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import initramfs

QEMU = "qemu-system-x86_64"
QEMU_PACKAGE = "qemu-system-x86"
KERNEL_PACKAGE = "linux-image-amd64"  # the meta package; the cloud flavour has no 9p
WANTED_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")


class Unavailable(Exception):
    """The lab cannot exist on this machine; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Cache:
    """Where the unpacked kernel lies; `base` is the initramfs without a job."""

    root: Path

    @classmethod
    def default(cls) -> Cache:
        configured = os.environ.get("NUMAGRAFT_LAB_CACHE")
        return cls(Path(configured) if configured else Path(__file__).resolve().parents[2] / ".lab")

    @property
    def kernel(self) -> Path:
        return self.root / "kernel"

    @property
    def base(self) -> Path:
        return self.root / "base.cpio"

    def require(self) -> None:
        """Raises Unavailable unless a guest can be booted."""
        if shutil.which(QEMU) is None:
            raise Unavailable(f"{QEMU} is not installed; run `python -m tests.lab setup` as root on Debian")
        if not (self.kernel.is_file() and self.base.is_file()):
            raise Unavailable(f"no guest kernel in {self.root}; run `python -m tests.lab setup`")


def setup(cache: Cache, *, refresh: bool = False) -> str:
    """Installs the emulator if missing (as root), downloads kernel and busybox, fills `cache`; says what it did."""
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool}: setup knows Debian and its derivatives only")
    if os.uname().machine != "x86_64":
        raise Unavailable(f"the lab emulates x86-64 with the host's own programs; this is {os.uname().machine}")
    if shutil.which(QEMU) is None:
        if os.geteuid() != 0:
            raise Unavailable(f"{QEMU} is missing and only root can install it: apt-get install {QEMU_PACKAGE}")
        _apt_lists()
        _apt("install", "-y", "--no-install-recommends", QEMU_PACKAGE)
    if not refresh and cache.kernel.is_file() and cache.base.is_file():
        return f"already set up in {cache.root}"
    _apt_lists()
    image = _kernel_image()
    cache.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="numagraft-lab.") as scratch:
        tree = _unpack(Path(scratch), image, "busybox-static")
        _write(cache.base, initramfs.archive(initramfs.base(_busybox(tree), list(_modules(tree)))))
        _write(cache.kernel, _bootable(next((tree / "boot").glob("vmlinuz-*")).read_bytes()))
    return f"{image} ready in {cache.root}"


def _apt(*arguments: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["apt-get", "-q", *arguments], cwd=cwd, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise Unavailable(f"`apt-get {' '.join(arguments)}` failed ({done.returncode}); its messages are above")


def _apt_lists() -> None:
    """Container images ship without package lists."""
    if not re.search(r"Candidate: [^(]", _apt_cache("policy", QEMU_PACKAGE)):
        if os.geteuid() != 0:
            raise Unavailable("apt has no package lists and only root can fetch them: apt-get update")
        _apt("update")


def _apt_cache(*arguments: str) -> str:
    return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=False).stdout


def _kernel_image() -> str:
    found = re.search(r"Depends: (linux-image-\S+)", _apt_cache("depends", KERNEL_PACKAGE))
    if found is None:
        raise Unavailable(f"apt knows no {KERNEL_PACKAGE}; setup needs Debian's archive for amd64")
    return found.group(1)


def _unpack(scratch: Path, *packages: str) -> Path:
    _apt("download", *packages, cwd=scratch)
    tree = scratch / "tree"
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True)
    return tree


def _busybox(tree: Path) -> bytes:
    return next(path for path in (tree / "bin/busybox", tree / "usr/bin/busybox") if path.is_file()).read_bytes()


def _modules(tree: Path) -> Iterator[tuple[str, bytes]]:
    """The wanted modules with what they depend on, in an order in which they can be inserted."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in tree.glob("**/lib/modules/**/*.ko*")}
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in files:  # not a file: built into the kernel
            return
        done.add(name)
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)  # modinfo; modules.dep is only made at installation
        for dependency in depends.group(1).decode().split(",") if depends else ():
            yield from visit(dependency.replace("-", "_"))
        yield name, data

    for wanted in WANTED_MODULES:
        yield from visit(wanted)


def _bootable(image: bytes) -> bytes:
    """The bare kernel where it is packed with xz (QEMU starts it by PVH): unpacking takes the guest itself 4 s."""
    start = image.find(b"\xfd7zXZ\0", 0x1000)
    return lzma.LZMADecompressor().decompress(image[start:]) if start > 0 else image


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: two setups may run at once."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
