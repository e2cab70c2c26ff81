"""A machine's files, wherever they are: its own /, a folder with a copy, or a dump in an archive.

Every read is bounded and may fail; a reader gets None and goes on, so that no content of a file, however strange, stops
detection.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from numagraft.errors import PlatformError, Problem

#: One file of sysfs or procfs; cpuinfo of a large machine is the longest that is read whole.
READ_LIMIT = 1 << 16
LONG_READ_LIMIT = 1 << 24
#: An archive is a stranger's: bounds on what is kept of it in memory.
ARCHIVE_FILE_LIMIT = 1 << 22
ARCHIVE_TOTAL_LIMIT = 1 << 28
ARCHIVE_MEMBER_LIMIT = 1 << 18


class Tree:
    """Files by absolute path ("/sys/devices/system/node/online")."""

    #: True for the machine this process runs on: only then may its memory be bound.
    live = False
    name = ""

    def read_bytes(self, path: str, limit: int = READ_LIMIT) -> bytes | None:
        """The first `limit` bytes of a regular file, None where there is none or it cannot be read."""
        raise NotImplementedError

    def entries(self, path: str) -> tuple[str, ...]:
        """Names in a folder, sorted; empty where there is none."""
        raise NotImplementedError

    def read(self, path: str, limit: int = READ_LIMIT) -> str | None:
        """The text of a file without its padding: saved sysfs files are filled up with NULs by some archivers."""
        data = self.read_bytes(path, limit)
        return None if data is None else data.decode("utf-8", "replace").replace("\0", "").strip()

    def exists(self, path: str) -> bool:
        return self.read_bytes(path, 1) is not None


class FolderTree(Tree):
    """Files under a folder. `live` is for "/" alone."""

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.realpath(root)
        self.live = self._root == "/"
        self.name = str(root)
        self._prefix = "" if self.live else self._root

    def _place(self, path: str) -> str | None:
        place = self._prefix + path
        if not self.live:
            # A copy may hold links that lead out of it, to this machine's files or to a device.
            real = os.path.realpath(place)
            if not (real + "/").startswith(self._root + "/"):
                return None
            return real
        return place

    def read_bytes(self, path: str, limit: int = READ_LIMIT) -> bytes | None:
        try:
            place = self._place(path)
            if place is None:
                return None
            # Not blocking: a FIFO in a copy would wait for a writer for ever.
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            pieces, left = [], limit
            while left > 0:
                piece = os.read(descriptor, left)
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def entries(self, path: str) -> tuple[str, ...]:
        try:
            place = self._place(path)
            return tuple(sorted(os.listdir(place))) if place is not None else ()
        except (OSError, ValueError):
            return ()


class MemoryTree(Tree):
    """Files held in memory: what an archive had in it, or what a test makes up."""

    def __init__(
        self, files: Mapping[str, str | bytes], *, links: Mapping[str, str] | None = None, name: str = "memory"
    ) -> None:
        self.name = name
        self._files = {
            self._clean(path): value.encode() if isinstance(value, str) else value for path, value in files.items()
        }
        self._links = {self._clean(path): target for path, target in (links or {}).items()}
        self._folders: dict[str, set[str]] = {}
        for path in (*self._files, *self._links):
            while path != "/":
                parent, _, name = path.rpartition("/")
                parent = parent or "/"
                names = self._folders.setdefault(parent, set())
                if name in names:
                    break
                names.add(name)
                path = parent

    @staticmethod
    def _clean(path: str) -> str:
        return posixpath.normpath("/" + path.lstrip("/"))

    def _follow(self, path: str) -> str | None:
        """The path with every link on its way replaced; None when links run in a circle."""
        path = self._clean(path)
        for _ in range(40):
            parts = path.split("/")[1:]
            for count in range(1, len(parts) + 1):
                head = "/" + "/".join(parts[:count])
                if head in self._links:
                    target = posixpath.join(posixpath.dirname(head), self._links[head])
                    path = self._clean(posixpath.join(target, *parts[count:]))
                    break
            else:
                return path
        return None

    def read_bytes(self, path: str, limit: int = READ_LIMIT) -> bytes | None:
        path = self._clean(path)
        data = self._files.get(path)
        if data is None and self._links:
            followed = self._follow(path)
            data = self._files.get(followed) if followed is not None else None
        return None if data is None else data[:limit]

    def entries(self, path: str) -> tuple[str, ...]:
        path = self._clean(path)
        if path not in self._folders and self._links:
            path = self._follow(path) or path
        return tuple(sorted(self._folders.get(path, ())))


def open_dump(path: str | Path) -> Tree:
    """The files of a dump: a folder, or an archive as hwloc-gather-topology writes it (.tar.bz2; .xz, .gz, plain).

    The folders `sys` and `proc` may stand at the top or one level down; a dump of the folders `node` and `cpu` of
    /sys/devices/system alone is understood too. Raises PlatformError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return FolderTree(_dump_root(path))
    if not path.exists():
        raise PlatformError("no such dump", [Problem(str(path), "there is no such file or folder", _DUMP_HINT)])
    try:
        return _read_archive(path)
    except tarfile.ReadError as error:
        # Python lists what every way of unpacking said.
        raise PlatformError(
            "cannot read the dump",
            [
                Problem(
                    str(path), "it is no tar archive, plain or packed by gzip, bzip2 or xz, or is cut off", _DUMP_HINT
                )
            ],
        ) from error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise PlatformError(
            "cannot read the dump", [Problem(str(path), f"not a readable archive: {error}", _DUMP_HINT)]
        ) from error


_DUMP_HINT = "give a folder with sys/ and proc/ in it, an archive of one (hwloc-gather-topology makes them), or a .json"


def _dump_root(folder: Path) -> Path:
    if (folder / "sys").is_dir():
        return folder
    inside = sorted(child for child in folder.iterdir() if (child / "sys").is_dir())
    if len(inside) == 1:
        return inside[0]
    found = f"{len(inside)} folders with sys/ in them" if inside else "no sys/ in it"
    raise PlatformError("not a dump of a machine", [Problem(str(folder), f"the folder has {found}", _DUMP_HINT)])


def _read_archive(path: Path) -> MemoryTree:
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    total = 0
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive):
            if count >= ARCHIVE_MEMBER_LIMIT:
                raise ValueError(f"more than {ARCHIVE_MEMBER_LIMIT} members")
            name = posixpath.normpath("/" + member.name)
            if member.issym():
                links[name] = member.linkname
            elif member.isfile() and member.size <= ARCHIVE_FILE_LIMIT:
                total += member.size
                if total > ARCHIVE_TOTAL_LIMIT:
                    raise ValueError(f"more than {ARCHIVE_TOTAL_LIMIT >> 20} MiB unpacked")
                content = archive.extractfile(member)
                files[name] = content.read() if content is not None else b""
    prefix = _archive_prefix(files)
    if prefix is None:
        raise ValueError("neither sys/ nor node/ and cpu/ in it")
    old, new = prefix
    return MemoryTree(
        {new + name[len(old) :]: data for name, data in files.items() if name.startswith(old + "/")},
        links={new + name[len(old) :]: target for name, target in links.items() if name.startswith(old + "/")},
        name=str(path),
    )


def _archive_prefix(names: Iterable[str]) -> tuple[str, str] | None:
    """What to cut off every name, and what to put before it."""
    for name in names:
        parts = name.split("/")[1:]
        if len(parts) > 3 and parts[0] == "sys":
            return "", ""
        if len(parts) > 3 and parts[1] == "sys":
            return "/" + parts[0], ""
    for name in names:
        parts = name.split("/")[1:]
        if parts[0] == "node" or (parts[0] == "cpu" and len(parts) > 1):
            return "", "/sys/devices/system"
    return None
