"""Real control groups (version 2), made and removed by the test that needs one."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def control_group(name: str, **settings: str) -> Iterator[Path]:
    """A group with `settings` ("cpuset_mems" is the file cpuset.mems). A child joins it by `join`."""
    controllers = " ".join(sorted({f"+{key.split('_')[0]}" for key in settings}))
    (ROOT / "cgroup.subtree_control").write_text(controllers)
    group = ROOT / name
    group.mkdir()
    try:
        for key, value in settings.items():
            (group / key.replace("_", ".", 1)).write_text(value)
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError as error:  # a killed child takes a moment to leave
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.1)


def join(group: Path) -> None:
    """Moves the calling process into the group for the rest of its life: for children."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
