"""Builds the wheel, installs it into a fresh environment, and runs `installed.py` there, outside the source tree.

An editable install makes files importable that a wheel does not carry (and the reverse for data files), so only this shows
what users get. Third-party packages are borrowed from the environment that runs this script.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def third_party_paths() -> list[str]:
    """Folders on this environment's path that hold installed packages (not its editable installs)."""
    return [path for path in sys.path if Path(path).name == "site-packages"] or [sysconfig.get_path("purelib")]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="numagraft-wheel-") as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip"]
        # a build folder of its own: the editable install's must not leak files into the wheel
        subprocess.run(
            [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work / "dist"),
             "--config-settings", f"build-dir={work / 'build'}", str(ROOT)],
            check=True,
        )  # fmt: skip
        (wheel,) = (work / "dist").glob("*.whl")
        venv.create(work / "env", with_pip=False, symlinks=True)
        python = work / "env" / "bin" / "python"
        site = Path(
            subprocess.run(
                [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True, capture_output=True, text=True,
            ).stdout.strip()
        )  # fmt: skip
        subprocess.run([*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
        (site / "borrowed.pth").write_text("\n".join(third_party_paths()) + "\n")
        shutil.copy(HERE / "installed.py", work / "installed.py")
        print(f"testing {wheel.name} ({wheel.stat().st_size / 2**20:.1f} MiB)", flush=True)
        return subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder,
             "installed.py"],
            cwd=work, check=False,
        ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
