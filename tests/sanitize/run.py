"""Builds the extension under a sanitizer and runs the native tests with it: `python tests/sanitize/run.py address|thread`.
`ci` runs both, skips those whose runtime the compiler lacks, and ends with one line for each.

The sanitized extension lies in a package of its own under build/, so that the ordinary one stays as it is; the runtime of
the sanitizer is preloaded into Python, which is not built with it. Any report, in any process of the tests, fails the run.
Leaks are not looked for: the interpreter itself is full of them. Tests that import torch are left out. Builds are
incremental; CMAKE_CXX_COMPILER_LAUNCHER=ccache in the environment of the first keeps objects beyond them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERDICT = ROOT / "build" / "sanitize" / "verdict.txt"
ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)

#: Removes the finder of the editable installation, which would load the ordinary extension.
SITECUSTOMIZE = """\
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "skbc" not in type(finder).__module__]
"""


#: What each sanitizer must report, or it sees nothing: workers that skip their barriers; a write past a block of malloc.
CONTROLS = {
    "thread": """
from numagraft.native import Runtime
from numagraft.runtime import RuntimeLayout
Runtime(RuntimeLayout.virtual(2)).native.barriers_hold([0, 1], 1000, leave_out=True)
""",
    "address": """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ctypes.memset(libc.malloc(16), 0, 32)
""",
}


class Unavailable(Exception):
    """This machine cannot run a sanitizer; the message says why."""


def compile_extension(folder: Path, *options: str) -> Path:
    """Compiles native/ with these options of CMake's, and returns the extension."""
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    configure = [
        *("cmake", "-S", str(ROOT / "native"), "-B", str(folder), "-G", "Ninja"),
        *options,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
    ]
    # cmake and ninja come from pip into the environment's bin
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder)], check=True, env=environment)
    (extension,) = (folder / "bindings").glob("_native*.so")
    return extension


def assemble(extension: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH in which numagraft is this tree's Python with that extension."""
    package = folder / "package" / "numagraft"
    package.mkdir(parents=True, exist_ok=True)
    (package.parent / "sitecustomize.py").write_text(SITECUSTOMIZE)
    sources = {path.name: path for path in (ROOT / "framework/numagraft").iterdir() if path.name != "__pycache__"}
    sources |= {"operators": ROOT / "operators", "rules": ROOT / "rules", extension.name: extension}
    for old in package.iterdir():
        if old.is_symlink():
            old.unlink()
    for name, source in sources.items():
        (package / name).symlink_to(source)
    return package.parent


def preloaded(kind: str) -> str:
    """The sanitizer's runtime, and the C++ library whose exceptions it intercepts: Python itself links neither."""
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for name in ({"address": "libasan.so", "thread": "libtsan.so"}[kind], "libstdc++.so.6"):
        query = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            raise Unavailable(f"{compiler} has no {name}: install its sanitizer runtimes (Debian: libgcc-12-dev)")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def test_files() -> list[str]:
    """The native tests that import no torch."""
    files = sorted((ROOT / "tests/native").glob("test_*.py"))
    return [str(path) for path in files if "import torch" not in path.read_text()]


def clear(logs: Path) -> None:
    logs.mkdir(exist_ok=True)
    for old in logs.glob("report*"):
        old.unlink()


def run(kind: str, package: Path, logs: Path, arguments: list[str]) -> int:
    clear(logs)
    suppressions = Path(__file__).with_name("thread.supp")
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": preloaded(kind),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={logs / 'report'}:exitcode=66:allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={logs / 'report'}",
        # A forked child of a process with threads may make threads: that is what the tests are about.
        "TSAN_OPTIONS": f"die_after_fork=0:log_path={logs / 'report'}:exitcode=66:suppressions={suppressions}",
        # numpy's BLAS synchronises its threads in code that the thread sanitizer does not see
        "OPENBLAS_NUM_THREADS": "1",
        "NUMAGRAFT_SANITIZED": kind,
    }
    # GCC's thread sanitizer knows a fixed memory layout, which address space randomisation leaves.
    if ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE) < 0:
        print(
            "warning: address space randomisation stays on; the thread sanitizer may refuse to start", file=sys.stderr
        )
    probe = f"from numagraft import _native; assert _native.sanitizer() == {kind!r}, _native.__file__"
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment, cwd=ROOT)
    subprocess.run([sys.executable, "-c", CONTROLS[kind]], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    if not list(logs.glob("report*")):
        raise SystemExit(f"the {kind} sanitizer does not report a planted fault: its other findings mean nothing")
    clear(logs)
    # Who computes which case of a sweep makes no difference to races, and each takes ten times as long here.
    chosen = "not slow and not numa" + (" and not sweep" if kind == "thread" else "")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen]
    code = subprocess.run([*command, *(arguments or test_files())], env=environment, cwd=ROOT).returncode
    reports = sorted(logs.glob("report*"))
    for report in reports[:5]:
        lines = report.read_text().splitlines()
        print("\n".join(["", report.name, *(line[:300] for line in lines[:60])]))
    if reports:
        print(f"{len(reports)} process{'es' if len(reports) > 1 else ''} reported by the {kind} sanitizer, in {logs}")
    return code or (66 if reports else 0)


def check(kind: str, arguments: list[str], *, build_only: bool = False) -> int:
    """Raises Unavailable before anything is built."""
    preloaded(kind)
    folder = ROOT / "build" / "sanitize" / kind  # not beside the ordinary builds: tests look through those
    package = assemble(compile_extension(folder, f"-DNUMAGRAFT_SANITIZE={kind}"), folder)
    return 0 if build_only else run(kind, package, folder / "reports", arguments)


def ci() -> int:
    worst = 0
    lines = []
    for kind in CONTROLS:
        begin = time.monotonic()
        try:
            code = check(kind, [])
            verdict = "clean" if code == 0 else f"FAILED with exit code {code}"
            lines.append(f"sanitize: {kind}: {verdict}, {time.monotonic() - begin:.0f} s with its build")
            worst = worst or code
        except Unavailable as error:
            lines.append(f"sanitize: {kind}: skipped: {error}")
    print("\n".join(lines), flush=True)
    VERDICT.parent.mkdir(parents=True, exist_ok=True)
    VERDICT.write_text("\n".join(lines) + "\n")  # .ci/run repeats it at its end
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["address", "thread", "ci"])
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("tests", nargs="*", help="files or pytest arguments instead of all native tests")
    options = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("numagraft runs on Linux only")
    if options.kind == "ci":
        return ci()
    try:
        return check(options.kind, options.tests, build_only=options.build_only)
    except Unavailable as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
