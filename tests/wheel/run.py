"""Builds the wheel, installs it into fresh environments, and runs `installed.py` and the stranger's ten minutes there.

An editable install makes files importable that a wheel does not carry (and the reverse for data files), so only this shows
what users get. Third-party packages are borrowed from the environment that runs this script.
"""

from __future__ import annotations

import os
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


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a fresh environment in `folder` that has the wheel."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (site / "borrowed.pth").write_text("\n".join(third_party_paths()) + "\n")
    return python


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="numagraft-wheel-") as folder:
        work = Path(folder)
        # a build folder of its own: the editable install's must not leak files into the wheel
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--wheel-dir", str(work / "dist"), "--config-settings", f"build-dir={work / 'build'}", str(ROOT)],
            check=True,
        )  # fmt: skip
        (wheel,) = (work / "dist").glob("*.whl")
        python = install(wheel, work / "env")
        shutil.copy(HERE / "installed.py", work / "installed.py")
        # a copy: setuptools leaves build folders beside the sources
        example = shutil.copytree(ROOT / "examples" / "preset-package", work / "preset-package")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, str(example)], check=True)
        print(f"testing {wheel.name} ({wheel.stat().st_size / 2**20:.1f} MiB)", flush=True)
        quiet = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [str(python), *quiet, "-c", "/dev/null", "--rootdir", folder, "installed.py"], cwd=work, check=False
        )
        # the script runs here, the commands in it with the wheel: one environment writes and packs, another installs
        elsewhere = install(wheel, work / "elsewhere")
        stranger = subprocess.run(
            [sys.executable, *quiet, "-rs", "--basetemp", str(work / "stranger"), "tests/cli/test_stranger.py"],
            cwd=ROOT, check=False,
            env={**os.environ, "NUMAGRAFT_PYTHON": str(python), "NUMAGRAFT_OTHER_PYTHON": str(elsewhere)},
        )  # fmt: skip
        return done.returncode or stranger.returncode


if __name__ == "__main__":
    sys.exit(main())
