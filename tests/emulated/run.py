"""Tests the AVX-512 kernels on a CPU without AVX-512: `python tests/emulated/run.py [pytest arguments]`.

Builds the extension with each of their instructions as two of AVX2's (tests/emulated/immintrin.h), in a folder of its own under build/,
and runs the native tests with it, or what the arguments say. The rows `avx512` and `avx512_vnni` are then in the kernel table, and the
second is the one in use; tiles are not emulated. Slow: it says what they compute, not how fast.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.sanitize.run import assemble, compile_extension  # noqa: E402

FOLDER = ROOT / "build" / "emulated"


def main() -> int:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SystemExit(f"AVX-512 is emulated with AVX2, on Linux: this is {platform.system()} {platform.machine()}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(assemble(compile_extension(FOLDER, "-DNUMAGRAFT_EMULATE=ON"), FOLDER)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("NUMAGRAFT_ISA", None)
    probe = "from numagraft.native import capabilities; print(*capabilities().supported)"
    found = subprocess.run([sys.executable, "-c", probe], check=True, env=environment, cwd=ROOT, capture_output=True, text=True)
    if "avx512_vnni" not in found.stdout.split():
        raise SystemExit(f"this CPU has no AVX2 to emulate AVX-512 with: its kernels are {found.stdout.strip()}")
    chosen = sys.argv[1:] or ["-m", "not slow and not numa", "tests/native"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], env=environment, cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
